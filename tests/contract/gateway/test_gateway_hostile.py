"""What one caller can do to the others, and what nobody may: the recorder, places, memory, quotas, keys, forms."""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import hashlib
import hmac
import json
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa
from kserve.protocol.grpc import grpc_predict_v2_pb2 as oip_pb2
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from services.gateway.auth.callers import ALL_SCOPES, Caller
from services.gateway.auth.identity import CustomerVerifier, sign_customer
from services.gateway.auth.keys import KeyRing, create_key
from services.gateway.auth.origin import Attempts, address_of, begin_visit, peer_address
from services.gateway.config import IdentityConfig
from services.gateway.recorder import Record, audit_row
from services.gateway.server import Gateway
from services.gateway.store import Audit, Conversation, KeyWindow, Reservation, open_store
from services.gateway.testing import gateway_config, running_gateway, serve_app, until
from steersman.config.base import load_model
from steersman.errors import InternalError, RateLimitedError, UnauthenticatedError, UnavailableError
from steersman.store.engine import Store
from steersman.store.models import Answer, FeedbackEvent
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import chat_pb2, chat_pb2_grpc, common_pb2

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "steersman", "messages": [{"role": "user", "content": "hello there"}]}


@asynccontextmanager
async def serving(policy: FakePolicy, **changes: Any) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    limits = httpx.Limits(max_connections=None)
    async with (
        serve_policy(policy) as endpoint,
        running_gateway(gateway_config(endpoint, **changes)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=60) as http,
    ):
        yield gateway, http


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def rows(store: Store, *columns: Any) -> list[Any]:
    with store.reading() as session:
        return [tuple(row) for row in session.execute(sa.select(*columns))]


async def stored(gateway: Gateway) -> None:
    gateway.refusals.flush()
    await until(lambda: gateway.assistant.recorder.backlog == 0)


# --- the recorder and its brothers ------------------------------------------------------------------------------


class Issuer:
    def __init__(self, folder: Path) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self._key.public_key()))
        self.path = folder / "jwks.json"
        self.path.write_text(json.dumps({"keys": [{**public, "kid": "k", "alg": "RS256", "use": "sig"}]}))

    @property
    def config(self) -> dict[str, Any]:
        return {"jwt": [{"issuer": "shop", "audience": "bot", "jwks": str(self.path)}]}

    def token(self, subject: str) -> str:
        claims = {"sub": subject, "iss": "shop", "aud": "bot", "exp": int(time.time()) + 60}
        # As text with an escape, which JSON allows and UTF-8 does not.
        return jwt.encode(claims, self._key, algorithm="RS256", headers={"kid": "k"})


@pytest.mark.parametrize("subject", ["\ud800", "a\udfffb", "ann\n", "a\x85b", "", "x" * 201])
async def test_a_signed_subject_that_nothing_can_store_is_refused(
    policy: FakePolicy, tmp_path: Path, subject: str
) -> None:
    issuer = Issuer(tmp_path)
    async with serving(policy, identity=issuer.config) as (gateway, http):
        refused = await http.post(CHAT, json=BODY, headers={"x-customer-token": issuer.token(subject)})
        assert refused.status_code == 401
        good = await http.post(CHAT, json=BODY, headers={"x-customer-token": issuer.token("ann")})
        assert good.status_code == 200
        ((name, customer),) = rows(gateway.store, Answer.end_customer, Answer.customer)
        assert (len(name), customer) == (32, "default")
        assert (await http.get("/readyz")).status_code == 200


async def test_a_record_that_the_database_refuses_is_the_only_one(policy: FakePolicy) -> None:
    async with serving(policy) as (gateway, http):
        recorder, caller = gateway.assistant.recorder, Caller("k", "acme", ALL_SCOPES)
        poisons = [
            Record(audit_row(caller, "r-1\ud800", "answer", "stop")),
            Record(audit_row(caller, "r-2", "answer", "stop"), ({"id": object()},)),
        ]
        waits = [recorder.put(record) for record in poisons[:1]]
        waits += [recorder.put(Record(audit_row(caller, f"g-{n}", "answer", "stop"))) for n in range(5)]
        done = await asyncio.gather(*waits, return_exceptions=True)
        assert isinstance(done[0], InternalError)
        assert done[1:] == [None] * 5
        assert (await http.post(CHAT, json=BODY)).status_code == 200
        assert gateway.assistant.ready
        found = dict(rows(gateway.store, Audit.request_id, Audit.outcome))
        assert found["r-1"] == "unrecorded", "its line is there all the same"
        assert {f"g-{n}" for n in range(5)} <= set(found)


async def test_every_background_task_that_is_killed_comes_back(policy: FakePolicy) -> None:
    async with serving(policy) as (gateway, http):
        names = set(gateway.background.tasks)
        assert names == {"recorder", "probes", "health", "chores", "refusals", "leases", "http"}
        asking = asyncio.create_task(ask_steadily(http))
        for name in sorted(names - {"http"}):
            for _ in range(3):
                before = gateway.background.restarts
                gateway.background.tasks[name].cancel()
                await until(lambda: gateway.background.restarts > before and not gateway.background.down, 20)  # noqa: B023
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert (await http.post(CHAT, json=BODY)).status_code == 200
        await stored(gateway)

        # Whoever was killed in the middle of a transaction: nothing twice, nothing lost. The question that was given up
        # leaves a line without an answer.
        answers = sorted(answer_id for (answer_id,) in rows(gateway.store, Answer.id))
        lines = sorted(rows(gateway.store, Audit.answer_id, Audit.outcome))
        assert len(lines) == len({answer_id for answer_id, _ in lines})
        assert answers == [answer_id for answer_id, outcome in lines if outcome != "cancelled"]
        assert sum(outcome == "cancelled" for _, outcome in lines) <= 1


async def ask_steadily(http: httpx.AsyncClient) -> None:
    while True:
        await http.post(CHAT, json=BODY)


async def test_readiness_knows_what_is_down_and_a_dead_server_ends_the_process(policy: FakePolicy) -> None:
    async with serving(policy) as (gateway, http):
        gateway.background.down["recorder"] = "it died"
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["down"]) == (503, ["recorder"])
        assert (await http.post(CHAT, json=BODY)).status_code == 503
        del gateway.background.down["recorder"]
        ending = asyncio.create_task(gateway.run_until_signal())
        await asyncio.sleep(0)
        gateway.background.tasks["http"].cancel()
        with pytest.raises(InternalError, match="cannot go on"):
            await asyncio.wait_for(ending, 30)


async def test_the_queue_of_records_is_bounded_in_bytes(policy: FakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(policy) as (gateway, _):
        recorder = gateway.assistant.recorder
        insert = recorder._insert
        monkeypatch.setattr(recorder, "_insert", lambda *_: (_ for _ in ()).throw(OSError("away")))
        row = {"id": "a", "answer": "x" * 1_000_000, "prompt": []}
        with pytest.raises(UnavailableError):
            _ = [recorder.put(Record(answers=(row,))) for _ in range(100)]
        assert recorder.backlog < 40
        monkeypatch.setattr(recorder, "_insert", lambda *_: None)
        await until(lambda: recorder.backlog == 0)
        monkeypatch.setattr(recorder, "_insert", insert)
        assert recorder._bytes == 0


# --- places, memory, texts --------------------------------------------------------------------------------------


async def test_clients_that_do_not_read_hold_no_place_beyond_the_time_of_an_answer() -> None:
    policy = FakePolicy(reply=lambda _: " ".join(["x" * 200_000] * 60), keep_requests=False)
    limits = {"concurrentAnswers": 2, "queuedAnswers": 0, "answerSeconds": 1.5}
    async with serving(policy, limits=limits) as (gateway, http):
        body = json.dumps({**BODY, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        sockets = []
        for _ in range(2):
            raw = socket.create_connection(("127.0.0.1", gateway.port))
            raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            sockets.append(raw)
        await until(lambda: gateway.assistant.admission.running == 2)
        assert (await http.post(CHAT, json=BODY)).status_code == 429
        await until(lambda: gateway.assistant.admission.running == 0, 8)
        policy.reply = lambda _: "short"
        assert (await http.post(CHAT, json=BODY)).status_code == 200
        await stored(gateway)
        assert [o for (o,) in rows(gateway.store, Audit.outcome)].count("DeadlineError") == 2
        for raw in sockets:
            raw.close()


async def test_a_packed_message_is_refused_before_it_is_unpacked(policy: FakePolicy) -> None:
    async with serving(policy) as (gateway, http):
        bomb = gzip.compress(bytes(20 * 1024 * 1024), 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{gateway.grpc_port}", options=[("grpc.max_send_message_length", -1)]
        ) as channel:
            call = channel.unary_stream("/steersman.v1.ChatService/Chat")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in call(b"\x12" + bytes(1024), compression=grpc.Compression.Gzip):
                    pass
            assert refused.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)
        sent = await http.post(
            CHAT, content=bomb, headers={"content-encoding": "gzip", "content-type": "application/json"}
        )
        assert sent.status_code in (400, 413, 415)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 15 * 1024, "in KiB"


async def test_nul_and_half_characters_are_refused_or_cleaned_everywhere(policy: FakePolicy) -> None:
    policy.reply = lambda _: "a\0b"
    async with serving(policy) as (gateway, http):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
            stub = chat_pb2_grpc.ChatServiceStub(channel)
            message = common_pb2.Message(role="user", content="hello \0 there")
            parts = [part async for part in stub.Chat(chat_pb2.ChatRequest(messages=[message]))]
            answer_id = parts[-1].answer_id
            good = {"event_id": "e", "answer_id": answer_id, "reason": "r", "edited_answer": "better"}
            for field in good:
                request = chat_pb2.SubmitFeedbackRequest(**{**good, field: "a\0b"})
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.SubmitFeedback(request)
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, field
            await stub.SubmitFeedback(chat_pb2.SubmitFeedbackRequest(**good))
        for field in ("event_id", "answer_id", "reason", "edited_answer", "judge"):
            for text in ("a\\u0000b", "a\\ud800b"):
                raw = json.dumps({**good, "event_id": "f", field: "TEXT"}).replace("TEXT", text)
                sent = await http.post("/v1/feedback", content=raw, headers={"content-type": "application/json"})
                assert sent.status_code == 400 or field == "judge", (field, text, sent.text)
                assert sent.status_code < 500
        for text in ("a\\u0000b", "a\\ud800b"):
            raw = json.dumps({**BODY, "messages": [{"role": "user", "content": "TEXT"}]}).replace("TEXT", text)
            sent = await http.post(CHAT, content=raw, headers={"content-type": "application/json"})
            assert sent.status_code in (200, 400)


# --- quotas -----------------------------------------------------------------------------------------------------


async def test_forty_calls_at_once_get_the_quota_and_one_answer(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    key = create_key(store, "acme", ["chat"], tokens_per_minute=100)
    policy = FakePolicy(reply=lambda _: " ".join(["word"] * 400), seconds_per_token=0.001)
    async with (
        serve_policy(policy) as endpoint,
        running_gateway(gateway_config(endpoint, database=database, requireApiKey=True)) as one,
        running_gateway(gateway_config(endpoint, database=database, requireApiKey=True)) as two,
        httpx.AsyncClient(headers=bearer(key), timeout=60) as http,
    ):
        sent = [http.post((one, two)[n % 2].url + CHAT, json=BODY) for n in range(40)]
        answers = await asyncio.gather(*sent)
        assert [answer.status_code for answer in answers].count(200) == 1
        assert all(1 <= int(a.headers["retry-after"]) <= 60 for a in answers if a.status_code == 429)
        ((tokens,),) = rows(store, KeyWindow.tokens)
        assert 400 <= tokens <= 500
        assert rows(store, Reservation.id) == [], "what was set aside is settled"
        with store.transaction() as session:
            window = session.scalars(sa.select(KeyWindow)).one()
            window.began_at = window.began_at.replace(year=2020)
        assert (await http.post(two.url + CHAT, json=BODY)).status_code == 200, "a minute later"
    store.close()


async def test_leaving_early_and_samples_that_are_thrown_away_cost_what_they_cost(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    key = create_key(store, "acme", ["chat"], tokens_per_minute=10_000)
    policy = FakePolicy(reply=lambda _: " ".join(["word"] * 50), seconds_per_token=0.02)
    async with serving(policy, database=database, requireApiKey=True) as (gateway, http):
        asking = asyncio.create_task(http.post(CHAT, json={**BODY, "max_tokens": 60}, headers=bearer(key)))
        await until(lambda: policy.running == 1)
        asking.cancel()
        await until(lambda: policy.running == 0)
        await stored(gateway)
        ((tokens,),) = rows(store, KeyWindow.tokens)
        assert 60 <= tokens <= 70, "nobody heard how long it was, so it was as long as it might have been"
        policy.seconds_per_token = 0
        many = await http.post(CHAT, json={**BODY, "n": 3}, headers=bearer(key))
        assert many.json()["usage"]["completion_tokens"] > 150
        await stored(gateway)
        ((after,),) = rows(store, KeyWindow.tokens)
        assert after - tokens == many.json()["usage"]["total_tokens"]
    store.close()


async def test_a_key_has_so_many_answers_at_once(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    key = create_key(store, "acme", ["chat"], concurrent=2)
    policy = FakePolicy(seconds_per_token=0.1)
    async with serving(policy, database=database, requireApiKey=True) as (_, http):
        answers = await asyncio.gather(*(http.post(CHAT, json=BODY, headers=bearer(key)) for _ in range(5)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
        assert (await http.post(CHAT, json=BODY, headers=bearer(key))).status_code == 200
    store.close()


# --- idempotency ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"seed": 7}, {"conversation_id": "c-2"}, {"temperature": 0.5}, {"consent": True}, {"stop": ["x"]}, {"user": "u"}],
)
async def test_another_body_under_the_same_key_conflicts(policy: FakePolicy, change: dict[str, Any]) -> None:
    async with serving(policy) as (_, http):
        headers = {"idempotency-key": "k"}
        assert (await http.post(CHAT, json=BODY, headers=headers)).status_code == 200
        assert (await http.post(CHAT, json={**BODY, **change}, headers=headers)).status_code == 409
        assert len(policy.requests) == 1


async def test_a_replay_is_the_same_answer_with_its_token_and_a_line_in_the_trail(policy: FakePolicy) -> None:
    async with serving(policy) as (gateway, http):
        headers = {"idempotency-key": "k", "x-request-id": "r-1"}
        first = (await http.post(CHAT, json={**BODY, "seed": 3}, headers=headers)).json()
        headers["x-request-id"] = "r-2"
        again = (await http.post(CHAT, json={"seed": 3, **BODY}, headers=headers)).json()
        assert again["choices"] == first["choices"]
        assert again["model"] == first["model"]
        about = again["steersman"]
        thumbs = {"event_id": "e", "answer_id": again["id"], "thumbs": "up", "feedback_token": about["feedback_token"]}
        assert (await http.post("/v1/feedback", json=thumbs)).json() == {"created": True}
        lines = rows(gateway.store, Audit.request_id, Audit.outcome, Audit.answer_id)
        assert ("r-2", "replay", first["id"]) in lines


# --- who is asking ----------------------------------------------------------------------------------------------


async def test_wrong_keys_from_one_address_are_slowed_down_and_push_no_key_out(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    key = create_key(store, "acme", ["chat"])
    limits = {"failedLoginsPerMinute": 5}
    async with serving(FakePolicy(), database=database, requireApiKey=True, limits=limits) as (gateway, http):
        wrong = [bearer(f"sk-{n:012x}-{'x' * 43}") for n in range(12)]
        statuses = [(await http.post(CHAT, json=BODY, headers=headers)).status_code for headers in wrong]
        assert statuses == [401] * 5 + [429] * 7
        login = await http.post(
            "/login", data={"key": "sk-wrong"}, headers={"content-type": "application/x-www-form-urlencoded"}
        )
        assert login.status_code in (401, 429)
        await stored(gateway)
        refused = rows(store, Audit.action, Audit.outcome, Audit.origin, Audit.records)
        counts = {outcome: records[0]["count"] for action, outcome, _, records in refused if action == "refused"}
        assert counts["UnauthenticatedError"] >= 5
        assert counts["RateLimitedError"] >= 7
        assert all(len(origin) == 32 for action, _, origin, _ in refused if action == "refused")
    ring = KeyRing(store)
    loads = 0
    load = ring._load

    def counted(key_id: str) -> Any:
        nonlocal loads
        loads += 1
        return load(key_id)

    ring._load = counted  # type: ignore[method-assign]
    await ring.verify(key)
    for n in range(200):
        with pytest.raises(UnauthenticatedError):
            await ring.verify(f"sk-{n:012x}-{'x' * 43}")
        with pytest.raises(UnauthenticatedError):
            await ring.verify(f"sk-{n:012x}-{'x' * 43}")
    await ring.verify(key)
    assert loads == 201, "each unknown id once, the real key once"
    store.close()


async def test_refusals_leave_lines_and_a_flood_is_one(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    key = create_key(store, "acme", ["feedback"])
    async with serving(FakePolicy(), database=database, requireApiKey=True) as (gateway, http):
        for _ in range(50):
            await http.get("/v1/no-such-thing", headers=bearer(key))
            await http.post(CHAT, json=BODY, headers=bearer(key))
        await http.post(CHAT, json=BODY)
        await stored(gateway)
        lines = {
            (outcome, tenant): records[0]
            for outcome, tenant, records in rows(store, Audit.outcome, Audit.tenant, Audit.records)
        }
        assert lines["PermissionDeniedError", "acme"] == {"count": 50, "paths": [CHAT]}
        assert lines["UnauthenticatedError", ""]["count"] == 1
        assert lines["NotFoundError", ""]["count"] == 50
    store.close()


async def test_refusals_over_every_grpc_service_leave_lines(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    feedback, slow = create_key(store, "acme", ["feedback"]), create_key(store, "slow", ["chat"], requests_per_minute=1)
    infer = oip_pb2.ModelInferRequest(model_name="steersman")
    tensor = infer.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"hello")
    other = oip_pb2.ModelInferRequest(model_name="other", inputs=infer.inputs)
    hello = chat_pb2.ChatRequest(messages=[common_pb2.Message(role="user", content="hello")])
    async with serving(FakePolicy(), database=database, requireApiKey=True) as (gateway, _):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
            oip, chat = GRPCInferenceServiceStub(channel), chat_pb2_grpc.ChatServiceStub(channel)
            named = oip_pb2.ModelReadyRequest(name="other")
            tries = [
                (lambda key: oip.ModelInfer(infer, metadata=key), "", grpc.StatusCode.UNAUTHENTICATED),
                (lambda key: oip.ModelInfer(infer, metadata=key), feedback, grpc.StatusCode.PERMISSION_DENIED),
                (lambda key: oip.ModelInfer(other, metadata=key), slow, grpc.StatusCode.NOT_FOUND),
                (lambda key: oip.ModelReady(named, metadata=key), "", grpc.StatusCode.NOT_FOUND),
                (lambda key: oip.ModelInfer(infer, metadata=key), slow, None),
                (lambda key: oip.ModelInfer(infer, metadata=key), slow, grpc.StatusCode.RESOURCE_EXHAUSTED),
                (lambda key: chat.Chat(hello, metadata=key).read(), slow, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ]
            codes = []
            for call, key, _ in tries:
                try:
                    await call([("authorization", f"Bearer {key}")] if key else [])
                    codes.append(None)
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code())
            assert codes == [code for _, _, code in tries]
        await stored(gateway)
        lines = {
            (outcome, tenant): records[0]
            for outcome, tenant, kind, records in rows(store, Audit.outcome, Audit.tenant, Audit.action, Audit.records)
            if kind == "refused"
        }
        infer_path, ready_path = ("inference.GRPCInferenceService/" + name for name in ("ModelInfer", "ModelReady"))
        assert lines["UnauthenticatedError", ""] == {"count": 1, "paths": [infer_path]}
        assert lines["PermissionDeniedError", "acme"] == {"count": 1, "paths": [infer_path]}
        assert lines["NotFoundError", ""] == {"count": 2, "paths": [infer_path, ready_path]}
        assert lines["RateLimitedError", "slow"]["count"] == 2
    store.close()


def test_addresses_are_those_of_our_own_proxies() -> None:
    for one, other in (("2001:db8::1", "2001:db8::ffff:2"), ("::ffff:1.2.3.4", "1.2.3.4"), ("fe80::1%eth0", "fe80::2")):
        assert begin_visit(one).address == begin_visit(other).address, "one subscriber"
    assert begin_visit("2001:db8:0:1::1").address != begin_visit("2001:db8:0:2::1").address
    assert address_of("10.0.0.1", ["1.1.1.1, 2.2.2.2"], 0) == "10.0.0.1"
    assert address_of("10.0.0.1", ["1.1.1.1, 2.2.2.2"], 1) == "2.2.2.2"
    assert address_of("10.0.0.1", ["6.6.6.6", "1.1.1.1, 2.2.2.2"], 2) == "1.1.1.1"
    assert address_of("10.0.0.1", [], 1) == "10.0.0.1"
    assert peer_address("ipv4:127.0.0.1:4711") == "127.0.0.1"
    assert peer_address("ipv6:%5B::1%5D:4711") == "::1"


def test_attempts_come_back_and_addresses_are_bounded() -> None:
    attempts = Attempts(60, "tries")
    for _ in range(60):
        attempts.check("a")
        attempts.count("a")
    with pytest.raises(RateLimitedError, match="Too many tries"):
        attempts.check("a")
    attempts.check("b")
    for n in range(11_000):
        attempts.count(f"n{n}")
    assert len(attempts._seen) == 10_000


async def test_signed_names_keep_their_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S", "s" * 32)
    config = load_model(IdentityConfig, {"signedHeader": {"secretEnv": "S"}}, "test")
    verifier, moment = CustomerVerifier(config), int(time.time())

    async def ask(tenant: str, customer: str, signature: str) -> str:
        headers = {"x-customer": customer, "x-customer-signature": f"t={moment},{signature}"}
        found = await verifier.verify(headers, tenant)
        assert found is not None
        return found.id

    old = hmac.new(b"s" * 32, f"{moment}.a.b.c".encode(), hashlib.sha256).hexdigest()
    for tenant, customer in (("a.b", "c"), ("a", "b.c")):
        with pytest.raises(UnauthenticatedError):
            await ask(tenant, customer, f"v1={old}")
        new = sign_customer(b"s" * 32, customer, tenant, moment)
        assert await ask(tenant, customer, f"v2={new}") == customer
    plain = hmac.new(b"s" * 32, f"{moment}.acme.ann".encode(), hashlib.sha256).hexdigest()
    assert await ask("acme", "ann", f"v1={plain}") == "ann"


@pytest.mark.parametrize(
    "name", ["x-customer-token", "x-customer", "x-customer-signature", "authorization", "idempotency-key"]
)
async def test_a_header_that_decides_comes_once(policy: FakePolicy, name: str) -> None:
    async with serving(policy) as (gateway, http):
        sent = await http.post(CHAT, json=BODY, headers=[(name, "a"), (name, "b")])
        assert (sent.status_code, name in sent.text) == (400, True)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
            call = chat_pb2_grpc.ChatServiceStub(channel).Chat(
                chat_pb2.ChatRequest(messages=[common_pb2.Message(role="user", content="hi")]),
                metadata=[("x-customer-token", "a"), ("x-customer-token", "b")],
            )
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_keys_that_cannot_be_fetched_hold_nobody_up(tmp_path: Path) -> None:
    asked = 0
    document = json.loads(Issuer(tmp_path).path.read_text())

    async def jwks(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked
        asked += 1
        if asked <= 2:
            await asyncio.sleep(0.3)
        status = 503 if asked <= 2 else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(document).encode()})

    issuer = Issuer(tmp_path)
    document = json.loads(issuer.path.read_text())
    async with serve_app(jwks) as url:
        config = {"jwt": [{**issuer.config["jwt"][0], "jwks": url}]}
        verifier = CustomerVerifier(load_model(IdentityConfig, config, "test"))
        headers = {"x-customer-token": issuer.token("ann")}
        begin = time.monotonic()
        results = await asyncio.gather(*(verifier.verify(headers, "acme") for _ in range(30)), return_exceptions=True)
        assert {type(result) for result in results} == {UnavailableError}
        assert asked == 1, "thirty at once ask once"
        with pytest.raises(UnavailableError):
            await verifier.verify(headers, "acme")
        assert asked == 1, "and not again at once"
        assert time.monotonic() - begin < 3
        verifier._issuers["shop"]._pause = 0.0
        with pytest.raises(UnavailableError):
            await verifier.verify(headers, "acme")
        verifier._issuers["shop"]._pause = 0.0
        found = await verifier.verify(headers, "acme")
        assert found is not None
        assert found.id == "ann"


# --- browsers ---------------------------------------------------------------------------------------------------


async def test_forms_of_other_pages_and_names_that_are_not_ours_are_refused(policy: FakePolicy) -> None:
    async with serving(policy) as (gateway, http):
        form = {"name": "ann", "next": "/label"}
        own = f"http://127.0.0.1:{gateway.port}"
        for origin, status in (("null", 403), ("http://evil.example", 403), (own, 303), (None, 303)):
            sent = await http.post("/login", data=form, headers={"origin": origin} if origin else {})
            assert sent.status_code == status, origin
        sent = await http.post("/login", data=form, headers={"sec-fetch-site": "cross-site"})
        assert sent.status_code == 403
        page = await http.get("/login")
        assert page.headers["referrer-policy"] == "same-origin", "so that our own forms name themselves"
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        for host, status in (
            ("evil.example", 400), ("127.0.0.1.evil.example:8080", 400), ("localhost:9", 200), ("127.0.0.1", 200),
            ("[::1]:8080", 200), ("gateway", 200),
        ):  # fmt: skip
            assert (await http.get("/healthz", headers={"host": host})).status_code == status, host
    async with serving(policy, allowedHosts=["bot.example.com", "*.shop.example"]) as (_, http):
        for host, status in (("bot.example.com", 200), ("a.shop.example", 200), ("shop.example.evil", 400)):
            assert (await http.get("/healthz", headers={"host": host})).status_code == status, host


async def test_a_browsers_votes_are_one_verdict_and_limited(policy: FakePolicy) -> None:
    async with serving(policy, limits={"feedbackPerMinute": 30}) as (gateway, http):
        answer = (await http.post(CHAT, json=BODY)).json()
        token = answer["steersman"]["feedback_token"]
        statuses = []
        for number in range(40):
            thumbs = {"event_id": f"e{number}", "answer_id": answer["id"], "thumbs": "down", "feedback_token": token}
            statuses.append((await http.post("/v1/feedback", json=thumbs)).status_code)
        assert statuses[:30] == [200] * 30
        assert 429 in statuses
        found = rows(gateway.store, FeedbackEvent.current, FeedbackEvent.channel, FeedbackEvent.origin)
        assert [current for current, _, _ in found].count(True) == 1
        assert {channel for _, channel, _ in found} == {"browser"}
        assert all(len(origin) == 32 for _, _, origin in found)


@pytest.mark.parametrize("way", ["token", "nothing", "session", "grpc", "grpc token"])
async def test_judgements_without_a_key_are_limited_however_they_come(policy: FakePolicy, way: str) -> None:
    async with serving(policy, limits={"feedbackPerMinute": 5}) as (gateway, http):
        answer = (await http.post(CHAT, json=BODY)).json()
        token = answer["steersman"]["feedback_token"]
        if way == "session":
            http.cookies.set("steersman_session", await gateway.authenticator.begin_session("", "ann"))
        refused = 0
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
            stub = chat_pb2_grpc.ChatServiceStub(channel)
            for number in range(12):
                told = {"event_id": f"e{number}", "answer_id": answer["id"]}
                if way.endswith("token"):
                    told["feedback_token"] = token
                if way.startswith("grpc"):
                    try:
                        await stub.SubmitFeedback(chat_pb2.SubmitFeedbackRequest(**told, thumbs_up=False))
                    except grpc.aio.AioRpcError as error:
                        refused += error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                else:
                    refused += (await http.post("/v1/feedback", json=told | {"thumbs": "down"})).status_code == 429
        assert 5 <= refused <= 7, "the tests may take a while, in which one more passes"
        assert len(rows(gateway.store, FeedbackEvent.id)) == 12 - refused


async def test_a_feedback_token_stands_in_for_a_key_over_grpc(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    key = [("authorization", f"Bearer {create_key(store, 'acme', ['chat', 'feedback'])}")]
    hello = common_pb2.Message(role="user", content="hello")
    async with serving(FakePolicy(), database=database, requireApiKey=True) as (gateway, _):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
            stub = chat_pb2_grpc.ChatServiceStub(channel)
            parts = [p async for p in stub.Chat(chat_pb2.ChatRequest(messages=[hello], consent=True), metadata=key)]
            other = [p async for p in stub.Chat(chat_pb2.ChatRequest(messages=[hello]), metadata=key)][-1]
            told = {"event_id": "e", "answer_id": parts[-1].answer_id, "thumbs_up": True}
            good = chat_pb2.SubmitFeedbackRequest(**told, feedback_token=parts[-1].feedback_token)
            assert (await stub.SubmitFeedback(good)).created
            judged = chat_pb2.SubmitFeedbackRequest(**told | {"event_id": "f"}, judge="ann")
            assert (await stub.SubmitFeedback(judged, metadata=key)).created
            for wrong in (other.feedback_token, "1.x", "x" * 201, "\u00b2.\u00b2"):
                bad = chat_pb2.SubmitFeedbackRequest(**told, feedback_token=wrong)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.SubmitFeedback(bad)
                assert caught.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT)
        assert sorted(rows(store, FeedbackEvent.channel, FeedbackEvent.current)) == [
            ("application", True), ("browser", True),
        ]  # fmt: skip
        assert [consent for (consent,) in rows(store, Answer.consent)] == [True, None]
    store.close()


async def test_consent_is_asked_for_and_unknown_is_no(policy: FakePolicy) -> None:
    keeping = {"tenantConsent": {"default": True}}
    async with serving(policy, keeping=keeping) as (gateway, http):
        await http.post(CHAT, json={**BODY, "consent": False})
        await http.post(CHAT, json=BODY)
        await http.post(CHAT, json=BODY, headers={"x-consent": "false"})
        assert (await http.post(CHAT, json=BODY, headers={"x-consent": "maybe"})).status_code == 400
        assert [c for (c,) in rows(gateway.store, Answer.consent)] == [False, True, False]
    async with serving(policy) as (gateway, http):
        await http.post(CHAT, json=BODY)
        await http.post(CHAT, json={**BODY, "consent": True})
        assert [c for (c,) in rows(gateway.store, Answer.consent)] == [None, True]


async def test_answers_keep_their_evidence_as_long_as_they_should(policy: FakePolicy) -> None:
    async with serving(policy, keeping={"answerDays": 10, "evidenceDays": 5}) as (gateway, http):
        for _ in range(3):
            await http.post(CHAT, json={**BODY, "temperature": 0.5, "seed": 9, "conversation_id": "c"})
        with gateway.store.reading() as session:
            first, second, third = session.scalars(sa.select(Answer).order_by(Answer.created_at)).all()
        assert first.sampling["temperature"] == 0.5
        assert first.sampling["seed"] == "9"
        assert len(first.token_ids or b"") == len(first.logprobs or b"") == 4 * 4
        assert (first.adapter, first.prompt) == ("fake", [{"role": "user", "content": "hello there"}])
        with gateway.store.transaction() as session:
            for answer, days in ((first, 11), (second, 6)):
                session.get_one(Answer, answer.id).created_at = answer.created_at - dt.timedelta(days=days)
            session.execute(sa.update(Conversation).values(expires_at=first.created_at.replace(year=2020)))
        gateway.background.tasks["chores"].cancel()
        await until(lambda: len(rows(gateway.store, Answer.id)) == 2 and not rows(gateway.store, Conversation.id))
        await until(lambda: [t for (t,) in rows(gateway.store, Answer.token_ids)].count(None) == 1)
        assert {answer_id for (answer_id,) in rows(gateway.store, Answer.id)} == {second.id, third.id}


async def test_the_operator_sees_what_is_not_counted(policy: FakePolicy) -> None:
    async with serving(policy, limits={"feedbackPerMinute": 100}) as (_, http):
        for number in range(25):
            answer = (await http.post(CHAT, json=BODY)).json()
            token = answer["steersman"]["feedback_token"]
            thumbs = {"event_id": f"e{number}", "answer_id": answer["id"], "thumbs": "down", "feedback_token": token}
            assert (await http.post("/v1/feedback", json=thumbs)).status_code == 200
        page = (await http.get("/operator")).text
        assert "<td>20</td><td>20</td>" in page, "twenty voices of one address count"
        assert "Not counted" in page
        assert "<td>address</td>" in page
