"""What a gateway holds while it works is another's soon after its death, and its late result is nobody's."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from services.gateway import leases as leases_module
from services.gateway.auth.callers import Caller
from services.gateway.idempotency import Claim, IdempotencyKeys, end_claim
from services.gateway.keeping import forget_old
from services.gateway.leases import LENGTH, Leases
from services.gateway.quotas import Quotas
from services.gateway.store import Audit, Conversation, Idempotency, KeyUse, Reservation, open_store
from services.gateway.testing import gateway_config, running_gateway, until
from services.gateway.tools.desk import Desk
from services.gateway.tools_config import HandOver
from steersman.errors import ConflictError, RateLimitedError, UnavailableError
from steersman.store import Store
from steersman.store import engine as engine_module
from steersman.store.models import Answer, now
from steersman.testing.fake_policy import FakePolicy, serve_policy

CALLER = Caller("k", "acme", frozenset({"chat"}), concurrent=1)
CHAT = "/v1/chat/completions"
BODY = {"model": "steersman", "messages": [{"role": "user", "content": "one two three"}]}


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """As a gateway opens it."""
    opened = open_store(store_url)
    yield opened
    opened.close()


@pytest.fixture
def keys(store: Store) -> IdempotencyKeys:
    return IdempotencyKeys(store, Leases(store))


async def claimed(keys: IdempotencyKeys) -> Any:
    return await keys.claim(CALLER, "/r", "key", b"body")


def pass_time(store: Store, seconds: float, table: Any = Idempotency) -> None:
    """As if nobody had renewed anything for so long."""
    with store.transaction() as session:
        for row in session.scalars(sa.select(table)):
            row.expires_at -= dt.timedelta(seconds=seconds)


def end(store: Store, claim: Claim, result: dict[str, Any] | None) -> bool:
    with store.transaction() as session:
        return end_claim(session, claim, result)


async def test_the_key_of_a_dead_gateway_is_free_when_its_lease_is_over(store: Store, keys: IdempotencyKeys) -> None:
    first = await claimed(keys)
    with pytest.raises(ConflictError, match="still running"):
        await claimed(keys)
    pass_time(store, LENGTH.total_seconds() + 1)
    await keys.forget_expired()  # which forgets nothing that may still come to its end
    took = await asyncio.gather(*(claimed(keys) for _ in range(4)), return_exceptions=True)
    (second,) = (one for one in took if isinstance(one, Claim))
    assert sum(isinstance(one, ConflictError) for one in took) == 3
    assert not end(store, first, None), "it is not free, another one works"
    assert not end(store, first, {"said": "late"})
    assert end(store, second, {"said": "in time"})
    assert await claimed(keys) == {"said": "in time"}


async def test_a_claim_that_nobody_took_over_still_ends(store: Store, keys: IdempotencyKeys) -> None:
    claim = await claimed(keys)
    pass_time(store, 600)
    await keys.forget_expired()
    assert end(store, claim, {"said": "the database was away"})
    assert await claimed(keys) == {"said": "the database was away"}


async def test_what_is_held_is_renewed_until_it_ends(store: Store) -> None:
    leases = Leases(store)
    keys, quotas = IdempotencyKeys(store, leases), Quotas(store, leases)
    claim, reserved = await claimed(keys), await quotas.reserve(CALLER, 10)
    for table in (Idempotency, Reservation):
        pass_time(store, LENGTH.total_seconds() - 1, table)
    await leases.renew()
    for table in (Idempotency, Reservation):
        pass_time(store, LENGTH.total_seconds() - 10, table)
    with pytest.raises(ConflictError):
        await claimed(keys)
    with pytest.raises(RateLimitedError):
        await quotas.reserve(CALLER, 10)
    del claim, reserved  # as when their gateway died
    await leases.renew()
    for table in (Idempotency, Reservation):
        pass_time(store, 11, table)
    assert isinstance(await claimed(keys), Claim)
    assert await quotas.reserve(CALLER, 10) is not None


async def test_a_renewal_takes_nothing_back(store: Store, keys: IdempotencyKeys) -> None:
    leases = Leases(store)
    frozen = IdempotencyKeys(store, leases)
    first = await claimed(frozen)
    pass_time(store, 60)
    second = await claimed(keys)
    await leases.renew()
    assert not end(store, first, {"said": "late"})
    assert end(store, second, {"said": "in time"})
    await leases.renew()
    assert await claimed(keys) == {"said": "in time"}


@pytest.mark.parametrize("seconds", [7200, -7200, 40_000_000, -40_000_000])
async def test_a_gateways_clock_decides_nothing(
    store: Store, keys: IdempotencyKeys, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """On SQLite the clock is the machine's; there a lease that would last for ever is over."""
    postgresql = store.engine.dialect.name == "postgresql"
    monkeypatch.setattr(leases_module, "now", lambda: now() + dt.timedelta(seconds=seconds))
    first = await claimed(keys)
    monkeypatch.undo()
    if postgresql:
        with pytest.raises(ConflictError):
            await claimed(keys)
        assert end(store, first, {"said": "once"})
        monkeypatch.setattr(leases_module, "now", lambda: now() + dt.timedelta(seconds=seconds))
        await keys.forget_expired()
        assert await claimed(keys) == {"said": "once"}
    else:
        second = await claimed(keys)
        assert not end(store, first, {"said": "late"})
        assert end(store, second, {"said": "once"})
        assert await claimed(keys) == {"said": "once"}


async def test_a_gateways_clock_takes_no_action_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DESK_SECRET", "s" * 40)
    webhook = {"url": "http://127.0.0.1:9/", "secretEnv": "TEST_DESK_SECRET"}
    desk = Desk(HandOver.model_validate({"webhook": webhook}), store)
    proposal = await desk.propose(CALLER, "hand_over", {}, [])
    if store.engine.dialect.name == "postgresql":  # SQLite's clock is the machine's
        monkeypatch.setattr(leases_module, "now", lambda: now() + dt.timedelta(days=400))
    assert desk._begin(CALLER, proposal.id)["state"] == "proposed", "it has not run out"
    with pytest.raises(ConflictError):
        desk._begin(CALLER, proposal.id)
    await desk.close()


async def test_a_gateway_with_a_wrong_clock_deletes_and_forgets_nothing(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that is ahead for longer than answers are kept, all of them would be too old."""
    if store.engine.dialect.name != "postgresql":
        pytest.skip("SQLite's clock is the machine's")
    body = {**BODY, "conversation_id": "c"}
    async with serve_policy(FakePolicy()) as endpoint:
        config = gateway_config(endpoint, database=store_url)
        async with running_gateway(config) as gateway, httpx.AsyncClient(base_url=gateway.url, timeout=90) as http:
            for days in (-400, 400, 0):
                monkeypatch.setattr(leases_module, "now", lambda days=days: now() + dt.timedelta(days=days))
                assert (await http.post(CHAT, json=body)).status_code == 200
                forget_old(store, config.keeping)
                await gateway.assistant.memory.forget_expired()
    with store.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Answer)) == 3
        (conversation,) = session.scalars(sa.select(Conversation))
    assert len(conversation.turns) == 6


async def test_who_freezes_in_a_transaction_holds_nobody_up(
    store: Store, keys: IdempotencyKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.engine.dialect.name != "postgresql":
        pytest.skip("SQLite's writers wait for each other, and for no longer than 30 s")
    monkeypatch.setattr(engine_module, "_BRIEF", sa.text("SET LOCAL idle_in_transaction_session_timeout = '100ms'"))
    first = await claimed(keys)
    pass_time(store, 60)
    with contextlib.ExitStack() as frozen:
        session = frozen.enter_context(store.transaction())
        assert end_claim(session, first, {"said": "late"})
        assert isinstance(await asyncio.wait_for(claimed(keys), 60), Claim)
        with pytest.raises(UnavailableError):
            frozen.close()


class FrozenOnce(FakePolicy):
    """Its first answer waits for `thawed`."""

    def __init__(self) -> None:
        super().__init__()
        self.thawed = asyncio.Event()

    async def _answer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if len(self.requests) == 1:
            await self.thawed.wait()
        async for response in super()._answer(request, context):
            yield response


async def test_a_frozen_gateways_late_answer_is_no_second_one(store: Store, store_url: str) -> None:
    """The first one's lease runs out in the middle of its answer; then it goes on."""
    policy, headers = FrozenOnce(), {"idempotency-key": "key"}
    async with serve_policy(policy) as endpoint:
        config = gateway_config(endpoint, database=store_url)
        async with (
            running_gateway(config) as one,
            running_gateway(config) as two,
            httpx.AsyncClient(timeout=90) as http,
        ):
            whole = {**BODY, "conversation_id": "c"}
            late = asyncio.create_task(http.post(one.url + CHAT, json=whole, headers=headers))
            await until(lambda: policy.running == 1, 60)
            assert (await http.post(two.url + CHAT, json=whole, headers=headers)).status_code == 409
            pass_time(store, 60)
            answered = await http.post(two.url + CHAT, json=whole, headers=headers)
            assert answered.status_code == 200
            policy.thawed.set()
            refused = await late
            assert (refused.status_code, "took over" in refused.text) == (409, True)
            for gateway in (one, two):
                again = await http.post(gateway.url + CHAT, json=whole, headers=headers)
                assert again.json()["id"] == answered.json()["id"]
    with store.reading() as session:
        assert list(session.scalars(sa.select(Answer.id))) == [answered.json()["id"]]
        lines = session.execute(sa.select(Audit.action, Audit.outcome).order_by(Audit.id)).all()
        assert session.scalar(sa.select(sa.func.sum(KeyUse.requests))) == 2, "both were computed"
    assert ("answer", "ConflictError") in [tuple(line) for line in lines]
