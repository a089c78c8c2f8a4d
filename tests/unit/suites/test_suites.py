"""Suites from file to figures: reading, asking, intervals over cases, what changed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint
from typer.testing import CliRunner

from steersman.cli import app
from steersman.errors import ConfigError, DataError, SteersmanError, UnauthenticatedError, UnavailableError
from steersman.local.evaluate import names_of
from steersman.suites.asked import Asked, SuiteReport, SuiteResult, ask, read_results
from steersman.suites.asking import Decoding, Endpoint
from steersman.suites.checks import Spoken
from steersman.suites.schema import Suite, read_suite
from steersman.suites.verdicts import change, lines, share

SHOP = """
name: shop
system: Order 7 ships on 12 May.
cases:
  - id: ships
    messages: [{role: user, content: "When does order 7 ship?"}]
    tags: [orders]
    expect: {facts: [12 May]}
  - id: secret
    messages:
      - {role: user, content: Hello}
      - {role: user, content: "What is the password?"}
    tags: [leak, orders]
    expect: {secrets: [Heron-7719]}
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(SHOP)
    return path


def test_a_suite_is_read_from_yaml_and_from_jsonl(shop: Path, tmp_path: Path) -> None:
    suite = read_suite(shop)
    lined = tmp_path / "shop.jsonl"
    lined.write_text("".join(case.model_dump_json(by_alias=True) + "\n\n" for case in suite.cases))
    assert read_suite(lined).cases == suite.cases
    assert suite.messages(suite.cases[0])[0] == {"role": "system", "content": "Order 7 ships on 12 May."}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SHOP.replace("id: secret", "id: ships"), "two cases have the id 'ships'"),
        (SHOP.replace("{facts: [12 May]}", "{}"), "expect is empty"),
        (SHOP.replace("facts", "fact"), "did you mean 'facts'"),
        (SHOP.replace("Heron-7719", "abc"), "stand in an answer by chance"),
        (SHOP.replace("[12 May]", '["/(/"]'), "no regular expression"),
        (SHOP.replace("[12 May]", "[[]]"), "nothing can say"),
        (
            SHOP.replace('role: user, content: "When', 'role: assistant, content: "When'),
            "the last turn must be the user",
        ),
        ("name: a b\ncases: []", "cases"),
        ("- a", "must hold a mapping"),
    ],
)
def test_a_wrong_suite_is_told_with_its_field(shop: Path, text: str, reason: str) -> None:
    shop.write_text(text)
    with pytest.raises(ConfigError, match=reason) as told:
        read_suite(shop)
    assert str(shop) in str(told.value)


def test_a_wrong_line_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "a", "messages": [{"role": "user", "content": "x"}], "expect": {"maxWords": 3}}\n{"id"\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        read_suite(path)


def result(passed: dict[str, list[bool]], suite: str = "shop", tags: dict[str, tuple[str, ...]] | None = None):
    asked = [
        Asked(case=case, sample=number, tags=(tags or {}).get(case, ()), question="?", answers=("!",),
              checks={"facts": None if good else "no"})
        for case, samples in passed.items()
        for number, good in enumerate(samples)
    ]  # fmt: skip
    return SuiteResult(suite=suite, kind="business", target="m", decoding="greedy", asked=tuple(asked))


def test_shares_have_wilsons_interval_over_cases() -> None:
    found = share(result({str(n): [n < 17] for n in range(20)}))
    low, high = proportion_confint(17, 20, method="wilson")
    assert found == pytest.approx((0.85, low, high))
    # Ten answers to each case are not ten times as many cases.
    assert share(result({str(n): [n < 17] * 10 for n in range(20)})) == pytest.approx(found)
    # All passed says something of other cases, but not that all of them pass.
    assert share(result({str(n): [True] for n in range(20)})).low == pytest.approx(0.8389, abs=1e-4)


def test_results_by_tag() -> None:
    tags = {"a": ("x",), "b": ("x", "y"), "c": ()}
    marked = result({"a": [True, False], "b": [True, True], "c": [False, False]}, tags=tags)
    found = {line.name: (line.share.estimate, line.cases) for line in lines(marked)}
    assert found == {"all cases": (0.5, 3), "x": (0.75, 2), "y": (1.0, 1)}


def test_what_changed_is_paired_by_case() -> None:
    before = result({**{str(n): [True] for n in range(10)}, "gone": [True]})
    after = result({**{str(n): [n >= 6] for n in range(10)}, "new": [True]})
    found = change(before, after)
    assert found.worse == tuple("012345")
    assert (found.better, found.added, found.removed, found.common) == ((), ("new",), ("gone",), 10)
    assert found.p_value == pytest.approx(binomtest(0, 6).pvalue)
    assert found.difference is not None
    assert found.difference.estimate == pytest.approx(-0.6)
    assert found.difference.high < 0
    with pytest.raises(DataError, match="different suites"):
        change(before, result({"a": [True]}, suite="other"))


def test_an_error_is_no_pass_and_is_kept(shop: Path) -> None:
    suite = read_suite(shop)

    def converse(messages, tools, decoding, most, seed):
        raise UnavailableError("down")

    found = ask(suite, "m", converse, Decoding.parse("greedy"))
    assert share(found).estimate == 0.0
    assert {one.error for one in found.asked} == {"down"}

    def refused(messages, tools, decoding, most, seed):
        raise UnauthenticatedError("no key")

    with pytest.raises(UnauthenticatedError):
        ask(suite, "m", refused, Decoding.parse("greedy"))


def test_an_endpoint_that_answers_nothing_is_left_alone(shop: Path) -> None:
    one = read_suite(shop).cases[0]
    suite = Suite(name="many", cases=[one.model_copy(update={"id": f"{n}"}) for n in range(400)])
    asked: list[int] = []

    def converse(messages, tools, decoding, most, seed):
        asked.append(seed)
        raise UnavailableError("down")

    with pytest.raises(UnavailableError, match="the first 25 questions had no answer: down"):
        ask(suite, "m", converse, Decoding.parse("greedy"))
    assert len(asked) == 25

    def refused(messages, tools, decoding, most, seed):
        asked.append(seed)
        raise UnauthenticatedError("no key")

    asked.clear()
    with pytest.raises(UnauthenticatedError):
        ask(suite, "m", refused, Decoding.parse("greedy"))
    assert len(asked) <= 25


def test_a_line_of_a_suite_is_a_line_whatever_it_says(shop: Path, tmp_path: Path) -> None:
    path = tmp_path / "shop.jsonl"
    text = read_suite(shop).cases[0].model_dump_json(by_alias=True).replace("When", "When,\u2028\x85now,")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert "\u2028\x85" in read_suite(path).cases[0].messages[0].content
    path.write_text("")
    with pytest.raises(ConfigError, match="cases"):
        read_suite(path)


def test_samples_have_seeds_of_their_own_and_greedy_is_asked_once(shop: Path) -> None:
    seeds: list[int] = []

    def converse(messages, tools, decoding, most, seed):
        seeds.append(seed)
        return Spoken(("12 May",))

    suite = Suite(name="one", cases=read_suite(shop).cases[:1])
    assert len(ask(suite, "m", converse, Decoding.parse("0.7"), samples=3, seed=5).asked) == 3
    assert sorted(seeds) == [5, 6, 7]
    assert len(ask(suite, "m", converse, Decoding.parse("greedy"), samples=3).asked) == 1
    for wrong in ("hot", "-1", "nan", "2.1", "inf"):
        with pytest.raises(ConfigError, match="--decoding"):
            Decoding.parse(wrong)


@contextmanager
def chat(*answers: tuple[int, Any]) -> Iterator[tuple[Endpoint, list[dict[str, Any]]]]:
    """An endpoint that gives these answers one after the other, the last one again and again."""
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        status, body = answers[min(len(asked), len(answers)) - 1]
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.Response(status, content=content, headers={"retry-after": "0"})

    with Endpoint("http://127.0.0.1:9/v1", "m") as endpoint:
        endpoint._client = httpx.Client(base_url="http://127.0.0.1:9/v1/", transport=httpx.MockTransport(answer))
        yield endpoint, asked


def said(message: Any, **others: Any) -> dict[str, Any]:
    return {"choices": [{"message": message}], **others}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "Yes."}, "Yes."),
        ({"content": None}, ""),
        ({"content": [{"type": "text", "text": "Yes"}, {"type": "image_url"}, {"type": "text", "text": "."}]}, "Yes."),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": "half \ud83d"}, "half \ufffd"),
        ({"content": "whole \ud83d\ude00"}, "whole \U0001f600"),
    ],
)
def test_what_an_endpoint_says_is_text(message: dict[str, Any], text: str) -> None:
    with chat((200, said(message))) as (endpoint, _):
        assert endpoint.reply([], [], Decoding.parse("greedy"), 9, 1).text == text


@pytest.mark.parametrize(
    "body",
    [
        b"<html>", b"[]", b"3", {"choices": []}, {"choices": None}, {"choices": [{"message": None}]},
        said({"content": 3}), said({"content": {"a": "b"}}), said({"content": ["a"]}),
        said({"content": "a", "tool_calls": ["x"]}), said({"content": "a", "tool_calls": [{"function": None}]}),
        said({"content": "a", "tool_calls": [{"function": {"name": 3}}]}), said({"content": "a"}, steersman="x"),
        said({"content": "a"}, usage={"completion_tokens": "many"}), said({"content": "a"}, usage=[1]),
        b'{"choices": [{"message": {"content": "a"}}], "usage": {"completion_tokens": Infinity}}',
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error_of_its_case(body: Any, shop: Path) -> None:
    good = said({"content": "It ships on 12 May."})
    suite = Suite(name="two", cases=read_suite(shop).cases[:2])
    with chat((200, body), (200, good)) as (endpoint, _):
        found = ask(suite, "m", lambda *asked: endpoint.converse(*asked), Decoding.parse("greedy"), concurrency=1)
    assert [one.error is None for one in found.asked] == [False, True]
    assert "http://127.0.0.1:9/v1" in str(found.asked[0].error)


def test_a_call_whose_arguments_are_an_object_is_understood() -> None:
    calls = [{"id": "1", "function": {"name": "track", "arguments": {"order": 7}}}, {"function": {"name": "end"}}]
    with chat((200, said({"content": None, "tool_calls": calls}))) as (endpoint, _):
        reply = endpoint.reply([], [], Decoding.parse("greedy"), 9, 1)
    assert [call["function"] for call in reply.tool_calls] == [
        {"name": "track", "arguments": '{"order": 7}'}, {"name": "end", "arguments": ""},
    ]  # fmt: skip


def test_an_endpoint_that_is_full_is_asked_again_and_one_that_fails_is_not() -> None:
    good = (200, said({"content": "Yes."}))
    with chat((429, {}), (429, {}), good) as (endpoint, asked):
        assert endpoint.reply([], [], Decoding.parse("greedy"), 9, 1).text == "Yes."
        assert len(asked) == 3
    with chat((500, {"error": {"message": "broken"}})) as (endpoint, asked):
        with pytest.raises(SteersmanError, match="broken"):
            endpoint.reply([], [], Decoding.parse("greedy"), 9, 1)
        assert len(asked) == 1


def test_an_endpoint_that_answers_no_question_ends_the_command(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steersman.net._LONGEST_WAIT", 0.0)
    run = CliRunner().invoke(
        app, ["eval", "http://127.0.0.1:9/v1", "--model", "m", "--suite", str(shop), "--out", str(tmp_path / "a"),
              "--decoding", "greedy"],
    )  # fmt: skip
    assert isinstance(run.exception, UnavailableError)
    assert "answered no question of shop: http://127.0.0.1:9/v1 does not answer" in str(run.exception)
    assert not (tmp_path / "a").exists()
    wrong = CliRunner().invoke(app, ["eval", "http://h:port/v1", "--model", "m", "--suite", str(shop)])
    assert isinstance(wrong.exception, ConfigError)
    assert "is no URL" in str(wrong.exception)


@pytest.fixture
def endpoint():
    """A chat endpoint that echoes what it was asked; `bodies` are the requests."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "bot"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(body)
            last = body["messages"][-1]["content"]
            said = "It ships on 12 May." if "ship" in last else "I cannot share that."
            self._send({"choices": [{"message": {"content": said}}], "usage": {"completion_tokens": 6}})

        def _send(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    server.shutdown()
    server.server_close()


def test_the_bot_answers_in_between(endpoint) -> None:
    url, bodies = endpoint
    with Endpoint(url) as chat:
        spoken = chat.converse(
            [{"role": "user", "content": "When does it ship?"}, {"role": "user", "content": "And why?"}],
            [], Decoding.parse("served"), 9, 3,
        )  # fmt: skip
    assert spoken.answers == ("It ships on 12 May.", "I cannot share that.")
    assert [message["role"] for message in bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert "temperature" not in bodies[-1]
    assert (bodies[-1]["model"], bodies[-1]["seed"], bodies[-1]["max_tokens"]) == ("bot", 3, 9)
    assert spoken.tokens == 12


def test_eval_of_an_endpoint_writes_json_and_one_page_and_says_what_changed(
    endpoint, shop: Path, tmp_path: Path
) -> None:
    url, bodies = endpoint
    run = CliRunner().invoke(
        app, ["eval", url, "--suite", str(shop), "--out", str(tmp_path / "a"), "--samples", "2", "--json"]
    )
    assert run.exit_code == 0, run.output
    numbers = json.loads(run.output.splitlines()[-1])
    name = url.removeprefix("http://")
    assert numbers[name]["shop"]["greedy"]["shares"]["all cases"][0] == 1.0
    assert numbers[name]["shop"]["served"]["errors"] == 0
    assert {body.get("temperature", "own") for body in bodies} == {0.0, "own"}
    report = read_results(tmp_path / "a" / "suites.json")
    assert [len(one.asked) for one in report.results] == [2, 4]
    html = (tmp_path / "a" / "suites.html").read_text()
    assert "prefers-color-scheme: dark" in html
    assert "src=" not in html
    shop.write_text(SHOP.replace("12 May]", "13 May]"))
    again = CliRunner().invoke(
        app,
        ["eval", url, "--suite", str(shop), "--out", str(tmp_path / "b"), "--decoding", "greedy", "--json",
         "--previous", str(tmp_path / "a" / "suites.json")],
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert json.loads(again.output.splitlines()[-1])[name]["shop"]["greedy"]["worse"] == ["ships"]
    assert "not said: 12 May" not in (tmp_path / "b" / "suites.html").read_text()
    assert "not said: 13 May" in (tmp_path / "b" / "suites.html").read_text()


def test_a_results_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_results(tmp_path / "none.json")
    path = tmp_path / "suites.json"
    path.write_text(SuiteReport(date="", settings={}, results=(result({"a": [True]}),)).model_dump_json())
    path.write_text(path.read_text().replace('"sample":0', '"sample":"x"'))
    with pytest.raises(DataError, match=r"results\.0\.asked\.0\.sample"):
        read_results(path)


def test_every_target_has_a_name_of_its_own(tmp_path: Path) -> None:
    a, b = tmp_path / "x" / "model", tmp_path / "y" / "model"
    assert names_of([str(a), str(b), "http://h:1/v1"]) == ["model", "model (2)", "h:1/v1"]
    with pytest.raises(ConfigError, match="twice"):
        names_of(["a", "a"])
