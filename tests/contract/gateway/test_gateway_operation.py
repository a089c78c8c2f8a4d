"""Keys, scopes, limits, overload, idempotency, memory, feedback, audit trail, metrics, drain."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa

from services.gateway.auth.keys import create_key, main, revoke_key
from services.gateway.config import GatewayConfig
from services.gateway.server import Gateway
from services.gateway.store import Audit, KeyUse, open_store
from services.gateway.testing import gateway_config, running_gateway, until
from steersman.store.engine import Store
from steersman.store.models import Answer, FeedbackEvent
from steersman.testing.fake_policy import FakePolicy, serve_policy

BODY: dict[str, Any] = {"model": "steersman", "messages": [{"role": "user", "content": "hello there"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/gateway.db"


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    store = open_store(database)
    yield store
    store.close()


@asynccontextmanager
async def serving(policy: FakePolicy, **changes: Any) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    limits = httpx.Limits(max_connections=None)
    async with (
        serve_policy(policy) as endpoint,
        running_gateway(gateway_config(endpoint, **changes)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=30) as http,
    ):
        yield gateway, http


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# --- keys -------------------------------------------------------------------------------------------------------


async def test_a_key_opens_what_its_scopes_allow(policy: FakePolicy, database: str, store: Store) -> None:
    chat, nothing = create_key(store, "acme", ["chat"]), create_key(store, "acme", ["feedback"])
    async with serving(policy, database=database, requireApiKey=True) as (_, http):
        for headers in ({}, bearer("sk-none"), bearer(f"{chat[:-1]}!"), bearer(chat[:-2] + "xx"), bearer("eyJ.a.b")):
            refused = await http.post(CHAT, json=BODY, headers=headers)
            assert refused.status_code == 401, headers
            assert refused.json()["error"]["type"] == "authentication_error"
            assert refused.headers["www-authenticate"] == "Bearer"
        assert (await http.post(CHAT, json=BODY, headers=bearer(chat))).status_code == 200
        assert (await http.post(CHAT, json=BODY, headers=bearer(nothing))).status_code == 403
        assert (await http.get("/metrics", headers=bearer(chat))).status_code == 403
        assert (await http.get("/v1/models")).status_code == 401


def test_only_a_hash_of_a_key_is_stored(store: Store, tmp_path: Path) -> None:
    key = create_key(store, "acme", ["chat"])
    secret = key.rpartition("-")[2]
    store.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.split("-")[1].encode() in stored
    assert secret.encode() not in stored


async def test_revoked_and_expired_keys_are_refused(policy: FakePolicy, database: str, store: Store) -> None:
    revoked, expired = create_key(store, "acme", ["chat"]), create_key(store, "acme", ["chat"], days=-1)
    revoke_key(store, revoked.split("-")[1])
    async with serving(policy, database=database, requireApiKey=True) as (_, http):
        for key in (revoked, expired):
            assert (await http.post(CHAT, json=BODY, headers=bearer(key))).status_code == 401


def test_keys_command_line(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--database", database, "create", "--tenant", "acme", "--scope", "chat", "--days", "3"]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["--database", database, "revoke", key.split("-")[1]]) == 0
    assert main(["--database", database, "list"]) == 0
    assert "revoked" in capsys.readouterr().out
    assert main(["--database", database, "revoke", "nothing"]) == 4
    assert "There is no key" in capsys.readouterr().err


def test_beyond_loopback_a_key_is_needed() -> None:
    assert not GatewayConfig().auth_required
    assert GatewayConfig(host="0.0.0.0").auth_required
    assert not GatewayConfig(host="0.0.0.0", require_api_key=False).auth_required


# --- limits -----------------------------------------------------------------------------------------------------


async def test_rates_and_quotas_of_a_key(policy: FakePolicy, database: str, store: Store) -> None:
    by_request = create_key(store, "acme", ["chat"], requests_per_minute=2)
    by_token = create_key(store, "acme", ["chat"], tokens_per_minute=3)
    by_day = create_key(store, "acme", ["chat"], tokens_per_day=3)
    async with serving(policy, database=database, requireApiKey=True) as (_, http):

        async def statuses(key: str, n: int) -> list[int]:
            return [(await http.post(CHAT, json=BODY, headers=bearer(key))).status_code for _ in range(n)]

        assert await statuses(by_request, 3) == [200, 200, 429]
        assert await statuses(by_token, 2) == [200, 429]
        assert await statuses(by_day, 2) == [200, 429]
        refused = await http.post(CHAT, json=BODY, headers=bearer(by_token))
        assert 1 <= int(refused.headers["retry-after"]) <= 90
        assert refused.json()["error"]["type"] == "rate_limit_error"
    with store.reading() as session:
        used = {use.key_id: (use.requests, use.tokens) for use in session.scalars(sa.select(KeyUse))}
    assert used[by_day.split("-")[1]] == (1, 6)
    # The quota of the day outlives the process.
    async with serving(policy, database=database, requireApiKey=True) as (_, http):
        assert (await http.post(CHAT, json=BODY, headers=bearer(by_day))).status_code == 429


async def test_a_full_queue_refuses_and_the_served_are_served() -> None:
    policy = FakePolicy(seconds_per_token=0.05)
    limits = {"concurrentAnswers": 4, "queuedAnswers": 4, "queueSeconds": 20}
    async with serving(policy, limits=limits) as (gateway, http):
        answers = await asyncio.gather(*(http.post(CHAT, json=BODY) for _ in range(40)))
        counts = {status: [a.status_code for a in answers].count(status) for status in (200, 429)}
        assert counts == {200: 8, 429: 32}
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
        assert policy.peak <= 4
        assert gateway.assistant.admission.running == gateway.assistant.admission.waiting == 0
        assert (await http.post(CHAT, json=BODY)).status_code == 200


async def test_ten_times_the_capacity_leaves_the_gateway_as_it_was() -> None:
    """The minute-long form with latencies and memory is in benchmarks/gateway.py."""
    policy = FakePolicy(seconds_per_token=0.02, keep_requests=False)
    statuses: list[int] = []
    async with serving(policy, limits={"concurrentAnswers": 4, "queuedAnswers": 2}) as (gateway, http):

        async def insist() -> None:
            for _ in range(6):
                answer = await http.post(CHAT, json=BODY, timeout=120)
                statuses.append(answer.status_code)
                if answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1

        await http.post(CHAT, json=BODY)
        tasks = len(asyncio.all_tasks())
        await asyncio.gather(*(insist() for _ in range(40)))
        assert set(statuses) == {200, 429}
        # Nobody waits behind more than the queue: what is served is served in time, the rest is told at once.
        assert policy.peak <= 4
        await until(lambda: policy.finished == statuses.count(200) + 1)
        admission = gateway.assistant.admission
        assert (admission.running, admission.waiting, gateway.assistant.recorder.backlog) == (0, 0, 0)
        await until(lambda: len(asyncio.all_tasks()) <= tasks + 1)
        assert (await http.post(CHAT, json=BODY)).status_code == 200


async def test_waiting_in_the_queue_ends(policy: FakePolicy) -> None:
    policy.seconds_per_token = 0.2
    async with serving(policy, limits={"concurrentAnswers": 1, "queueSeconds": 0.1}) as (_, http):
        answers = await asyncio.gather(*(http.post(CHAT, json=BODY) for _ in range(3)))
        assert sorted(a.status_code for a in answers) == [200, 429, 429]


async def test_a_client_that_leaves_the_queue_frees_its_place(policy: FakePolicy) -> None:
    policy.seconds_per_token = 0.1
    async with serving(policy, limits={"concurrentAnswers": 1, "queuedAnswers": 1}) as (gateway, http):
        first = asyncio.create_task(http.post(CHAT, json=BODY))
        await until(lambda: policy.running == 1)
        second = asyncio.create_task(http.post(CHAT, json=BODY))
        await until(lambda: gateway.assistant.admission.waiting == 1)
        second.cancel()
        await until(lambda: gateway.assistant.admission.waiting == 0)
        assert (await first).status_code == 200
        assert (await http.post(CHAT, json=BODY)).status_code == 200


async def test_large_and_slow_bodies_are_refused(policy: FakePolicy) -> None:
    async with serving(policy, limits={"bodyBytes": 1000}) as (_, http):
        large = await http.post(CHAT, json={**BODY, "messages": [{"role": "user", "content": "x" * 2000}]})
        assert large.status_code == 413

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b" " * 900

        headers = {"content-type": "application/json"}
        assert (await http.post(CHAT, content=chunks(), headers=headers)).status_code == 413
        assert (await http.post(CHAT, content=b"a=b")).status_code == 415
    async with serving(policy, limits={"bodySeconds": 0.3}) as (gateway, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n".encode())
        writer.write(b"content-length: 100\r\n\r\n{")
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 30)
        writer.close()
        # Headers that never end, and a connection that says nothing at all.
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: ")
        answer = await asyncio.wait_for(reader.read(), 30)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"send them faster" in answer
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()


async def test_an_answer_that_takes_too_long_is_ended(policy: FakePolicy) -> None:
    policy.seconds_per_token = 0.5
    async with serving(policy, limits={"answerSeconds": 0.2}) as (_, http):
        answer = await http.post(CHAT, json=BODY)
        assert answer.status_code == 504
        assert "longer than 0.2 s" in answer.json()["error"]["message"]
        await until(lambda: policy.running == 0)


# --- idempotency and memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_idempotency_key_answers_once(policy: FakePolicy, stream: bool) -> None:
    async with serving(policy) as (_, http):
        headers = {"idempotency-key": "k1"}
        first = await http.post(CHAT, json={**BODY, "stream": stream}, headers=headers)
        again = await http.post(CHAT, json=BODY, headers=headers)
        other = await http.post(CHAT, json={**BODY, "n": 2}, headers=headers)
        assert len(policy.requests) == 1
        assert again.json()["choices"][0]["message"]["content"] == "You said: hello there"
        assert again.json()["id"] in first.text
        assert other.status_code == 409
        assert (await http.post(CHAT, json=BODY, headers={"idempotency-key": "x" * 300})).status_code == 400


async def test_a_running_idempotent_request_conflicts_and_a_failed_one_may_repeat(policy: FakePolicy) -> None:
    async with serving(policy) as (_, http):
        policy.seconds_per_token = 0.1
        headers = {"idempotency-key": "k1"}
        first = asyncio.create_task(http.post(CHAT, json=BODY, headers=headers))
        await until(lambda: policy.running == 1)
        assert (await http.post(CHAT, json=BODY, headers=headers)).status_code == 409
        first.cancel()
        await until(lambda: policy.running == 0)
        policy.seconds_per_token = 0
        async with asyncio.timeout(10):
            while (await http.post(CHAT, json=BODY, headers=headers)).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_conversations_are_remembered_for_their_owner(policy: FakePolicy, database: str, store: Store) -> None:
    one, two = create_key(store, "acme", ["chat"]), create_key(store, "other", ["chat"])
    body = {**BODY, "conversation_id": "c-1"}
    async with serving(policy, database=database, memory={"seconds": 1}, requireApiKey=True) as (_, http):
        for key in (one, one, two):
            assert (await http.post(CHAT, json=body, headers=bearer(key))).status_code == 200
        said = [[m.content for m in request.messages] for request in policy.requests]
        assert said[1] == ["hello there", "You said: hello there", "hello there"]
        assert said[2] == ["hello there"]
        await asyncio.sleep(1.1)
        await http.post(CHAT, json=body, headers=bearer(one))
        assert len(policy.requests[3].messages) == 1


# --- feedback and the audit trail -------------------------------------------------------------------------------


async def test_feedback_is_stored_once_and_only_from_the_tenant(
    policy: FakePolicy, database: str, store: Store
) -> None:
    acme, other = (create_key(store, tenant, ["chat", "feedback"]) for tenant in ("acme", "other"))
    async with serving(policy, database=database, requireApiKey=True, deployment="candidate") as (_, http):
        answer = (await http.post(CHAT, json=BODY, headers=bearer(acme))).json()
        event = {"event_id": uuid.uuid4().hex, "answer_id": answer["id"], "thumbs": "down", "reason": "wrong"}
        for created in (True, False):
            stored = await http.post("/v1/feedback", json=event, headers=bearer(acme))
            assert (stored.status_code, stored.json()) == (200, {"created": created})
        changed = await http.post("/v1/feedback", json={**event, "thumbs": "up"}, headers=bearer(acme))
        assert changed.status_code == 409
        foreign = await http.post("/v1/feedback", json={**event, "event_id": "e2"}, headers=bearer(other))
        missing = await http.post("/v1/feedback", json={**event, "answer_id": "none"}, headers=bearer(other))
        assert foreign.status_code == missing.status_code == 404
        assert foreign.json()["error"]["message"].replace(answer["id"], "none") == missing.json()["error"]["message"]

        token = {"event_id": "e3", "answer_id": answer["id"], "edited_answer": "Better."}
        token["feedback_token"] = answer["steersman"]["feedback_token"]
        assert (await http.post("/v1/feedback", json=token)).json() == {"created": True}
        token["feedback_token"] = token["feedback_token"][:-1] + "x"
        assert (await http.post("/v1/feedback", json=token)).status_code == 401
        both = {**event, "event_id": "e4", "outcome": "refund"}
        assert (await http.post("/v1/feedback", json=both, headers=bearer(acme))).status_code == 400
    with store.reading() as session:
        assert sorted(session.scalars(sa.select(FeedbackEvent.kind))) == ["edit", "thumbs"]
        stored_answer = session.get_one(Answer, answer["id"])
    assert (stored_answer.customer, stored_answer.deployment) == ("acme", "candidate")
    assert stored_answer.prompt == BODY["messages"]
    assert stored_answer.answer == "You said: hello there"


async def test_an_answer_is_on_disk_when_its_last_token_arrives(
    policy: FakePolicy, database: str, store: Store
) -> None:
    async with (
        serving(policy, database=database) as (gateway, _),
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client,
    ):
        stream = await client.chat.completions.create(**BODY, stream=True, n=2)
        async for chunk in stream:
            last = chunk
        with store.reading() as session:
            found = set(session.scalars(sa.select(Answer.id)))
        assert found == {last.id, f"{last.id}.1"}


async def test_without_its_database_the_gateway_is_not_ready_and_recovers(
    policy: FakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(policy) as (gateway, http):
        recorder = gateway.assistant.recorder
        insert = recorder._insert

        def broken(session: Any, records: Any) -> None:
            raise sa.exc.OperationalError("insert", {}, Exception("the disk is gone"))

        monkeypatch.setattr(recorder, "_insert", broken)
        waiting = asyncio.create_task(http.post(CHAT, json=BODY))
        await until(lambda: recorder.failing)
        assert (await http.get("/readyz")).status_code == 503
        refused = await http.post(CHAT, json=BODY)
        assert (refused.status_code, "database" in refused.text) == (503, True)
        assert not waiting.done()
        monkeypatch.setattr(recorder, "_insert", insert)
        assert (await waiting).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
        with gateway.store.reading() as session:
            assert session.scalar(sa.select(sa.func.count()).select_from(Answer)) == 1


async def test_the_audit_trail_tells_who_got_what(policy: FakePolicy, database: str, store: Store) -> None:
    key = create_key(store, "acme", ["chat", "feedback"])
    policy.weights_version = 7
    async with serving(policy, database=database, requireApiKey=True) as (_, http):
        headers = {**bearer(key), "x-request-id": "r-1"}
        answer = (await http.post(CHAT, json=BODY, headers=headers)).json()
        policy.fail_after_tokens = 1
        await http.post(CHAT, json={**BODY, "stream": True}, headers={**headers, "x-request-id": "r-2"})
        event = {"event_id": "e", "answer_id": answer["id"], "outcome": "refund"}
        await http.post("/v1/feedback", json=event, headers=headers)
    with store.reading() as session:
        lines = list(session.scalars(sa.select(Audit).order_by(Audit.id)))
    assert [(a.action, a.outcome) for a in lines] == [
        ("answer", "stop"), ("answer", "UnavailableError"), ("feedback", "outcome")
    ]  # fmt: skip
    first = lines[0]
    assert (first.tenant, first.key_id, first.request_id) == ("acme", key.split("-")[1], "r-1")
    assert (first.answer_id, first.weights_version) == (answer["id"], "7")
    assert (first.prompt_tokens, first.completion_tokens) == (2, 4)


async def test_nothing_private_in_the_logs(policy: FakePolicy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="steersman")
    private = ["jane@example.com", "+49 170 1234567", "DE89370400440532013000", "4111 1111 1111 1111", "sk-0"]
    content = "I am " + " ".join(private)
    async with serving(policy) as (_, http):
        await http.post(CHAT, json={**BODY, "messages": [{"role": "user", "content": content}]})
        await http.get("/nowhere/jane@example.com", headers=bearer("sk-0123456789ab-" + "x" * 43))
        await http.post(CHAT, content=content, headers={"content-type": "application/json"})
    from services.gateway.logs import JsonFormatter

    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert any('"path"' in line for line in lines)
    for secret in private:
        assert not any(secret in line for line in lines), secret


# --- metrics and the end ----------------------------------------------------------------------------------------


async def test_metrics_count_answers_and_replicas(policy: FakePolicy) -> None:
    async with serving(policy) as (_, http):
        await http.post(CHAT, json={**BODY, "stream": True})
        await http.post(CHAT, json={**BODY, "n": 0})
        text = (await http.get("/metrics")).text
    for line in (
        'steersman_gateway_answers_total{outcome="stop"} 1.0',
        'steersman_gateway_tokens_total{kind="completion"} 4.0',
        f'steersman_gateway_requests_total{{route="{CHAT}",status="400"}} 1.0',
        "steersman_gateway_first_token_seconds_count 1.0",
        "steersman_gateway_running_answers 0.0",
    ):
        assert line in text
    assert "steersman_gateway_replica_ready{replica=" in text


async def test_draining_ends_no_stream(policy: FakePolicy) -> None:
    policy.seconds_per_token = 0.05
    policy.reply = lambda request: "word " * 20
    async with serve_policy(policy) as endpoint:
        gateway = Gateway(gateway_config(endpoint))
        await gateway.start()
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as http:
            streams = [asyncio.create_task(http.post(CHAT, json={**BODY, "stream": True})) for _ in range(8)]
            await until(lambda: policy.running == 8)
            start = time.monotonic()
            await gateway.drain()
            assert time.monotonic() - start > 0.2
            for stream in streams:
                assert (await stream).text.endswith("data: [DONE]\n\n")
    assert policy.cancelled == 0
    assert policy.finished == 8


def test_an_unknown_field_is_named_in_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    from services.gateway.__main__ import main as gateway_main

    assert gateway_main(["--set", "limits.concurrentAnswer=3"]) == 2
    assert "did you mean 'concurrentAnswers'?" in capsys.readouterr().err
