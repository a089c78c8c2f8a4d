"""Rewards that are computed, on answers worked by hand; the HTTP scorer against a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from steersman.errors import ConfigError, UnavailableError
from steersman.rewards import build_reward

ASKED = [{"role": "user", "content": "When does order 17 come?"}]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Order 17 comes on Monday.", 1.0),
        ("It comes on MONDAY.", 0.5),
        ("Order 170 comes on Mondays.", 0.0),  # neither is the value: 170 is not 17
        ("", 0.0),
    ],
)
def test_exact_facts(answer: str, value: float) -> None:
    assert build_reward("exact-facts", {})(ASKED, answer, {"needed": [17, "Monday"]}).value == value


def test_exact_facts_without_facts_is_no_verdict() -> None:
    with pytest.raises(ValueError, match=r"facts\.needed must be a list with at least one value"):
        build_reward("exact-facts", {})(ASKED, "17", {})


@pytest.mark.parametrize(("answer", "value"), [("Thank you.", 0.3), ("thanks", -0.2)])
def test_regex(answer: str, value: float) -> None:
    reward = build_reward("regex", {"pattern": r"\bThank\b", "match": 0.3, "miss": -0.2})
    assert reward(ASKED, answer, {}).value == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"order": 17}', 1.0),
        ('{"order": "17"}', 0.0),
        ('I look. <tool_call>\n{"name": "find", "arguments": {"order": 17}}\n</tool_call>', 1.0),
        ('<tool_call>{"name": "find", "arguments": {}}</tool_call>', 0.0),
        ('<tool_call>{"name": "find"}</tool_call>', 0.0),
        ("order 17", 0.0),
    ],
)
def test_json_schema_of_an_answer_or_a_tool_call(answer: str, value: float) -> None:
    schema = {"type": "object", "properties": {"order": {"type": "integer"}}, "required": ["order"]}
    assert build_reward("json-schema", {"schema": schema})(ASKED, answer, {}).value == value


@pytest.fixture
def scorer() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(URL, bodies that arrived) of a server that gives an answer its length."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append({**body, "key": self.headers.get("X-Key")})
            length = len(body["answer"])
            self.send_response(200 if length else 500)
            self.end_headers()
            verdict = {"reward": length, "criteria": {"half": length / 2}} if length < 10 else {"score": length}
            self.wfile.write(json.dumps(verdict).encode())

        def log_message(self, *arguments: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_http_scorer(scorer: tuple[str, list[dict[str, Any]]]) -> None:
    url, bodies = scorer
    reward = build_reward("http", {"url": url, "headers": {"X-Key": "secret"}})
    verdict = reward(ASKED, "17", {"needed": [17]})
    assert (verdict.value, verdict.criteria) == (2.0, {"half": 1.0})
    assert bodies == [{"messages": ASKED, "answer": "17", "facts": {"needed": [17]}, "key": "secret"}]
    with pytest.raises(UnavailableError, match="500"):
        reward(ASKED, "", {})
    with pytest.raises(UnavailableError, match="the answer must be JSON"):
        reward(ASKED, "longer than ten", {})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("regex", {"pattern": ["a"]}, r"reward regex: pattern is \['a'\]: input should be a valid string"),
        ("regex", {"pattern": {"a": 1}}, "reward regex: pattern is"),
        ("regex", {"pattern": "a", "match": "much"}, "reward regex: match is 'much': input should be a valid number"),
        ("exact-facts", {"field": 7}, "reward exact-facts: field is 7: "),
        ("json-schema", {"schema": "object"}, "reward json-schema: schema is 'object': "),
        ("http", {"url": "http://127.0.0.1:1", "headers": ["a"]}, "reward http: headers is"),
    ],
)
def test_an_option_of_another_type_is_refused_by_its_name(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_reward(name, options)
