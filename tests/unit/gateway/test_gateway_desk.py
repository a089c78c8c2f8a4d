"""A confirmed action is carried out once, whoever dies while it is."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from services.gateway.auth.callers import Caller
from services.gateway.store import ProposedAction, open_store
from services.gateway.tools import desk as desk_module
from services.gateway.tools import tickets
from services.gateway.tools.desk import Desk
from services.gateway.tools_config import HandOver
from steersman.errors import ConflictError, UnavailableError
from steersman.store.engine import Store
from steersman.store.models import now

CALLER = Caller("k", "acme", frozenset({"act"}))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = open_store(f"sqlite:///{tmp_path}/g.db")
    yield made
    made.close()


def desk_of(store: Store, monkeypatch: pytest.MonkeyPatch, sent: list[Any]) -> Desk:
    monkeypatch.setenv("TEST_DESK_SECRET", "s" * 40)
    config = HandOver.model_validate({"webhook": {"url": "http://127.0.0.1:9/", "secretEnv": "TEST_DESK_SECRET"}})
    desk = Desk(config, store)

    async def take(*arguments: Any, **content: Any) -> dict[str, str]:
        sent.append(content)
        return {"ticket": f"T-{len(sent)}"}

    monkeypatch.setattr(tickets, "fetch_json", take)
    return desk


async def test_what_a_killed_gateway_began_may_be_confirmed_again_soon(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    desk = desk_of(store, monkeypatch, sent)
    proposal = await desk.propose(CALLER, "hand_over", {}, [])
    begun = desk._begin(CALLER, proposal.id)  # and the gateway is killed here
    with pytest.raises(ConflictError):
        await desk.confirm(CALLER, proposal.id)
    with store.reading() as session:
        lease = session.get_one(ProposedAction, proposal.id).expires_at - now()
    assert lease < dt.timedelta(minutes=1), "not as long as a proposal may be confirmed"
    with store.transaction() as session:
        session.execute(sa.update(ProposedAction).values(expires_at=now() - dt.timedelta(seconds=1)))
    assert (await desk.confirm(CALLER, proposal.id))[1] == "T-1"
    desk._end(begun, "proposed", "")  # the first one was only slow, and failed
    assert (await desk.confirm(CALLER, proposal.id))[1] == "T-1"
    assert len(sent) == 1


async def test_a_proposal_that_was_not_delivered_may_be_confirmed_as_long_as_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = desk_of(store, monkeypatch, [])
    proposal = await desk.propose(CALLER, "hand_over", {}, [])
    with store.reading() as session:
        until = session.get_one(ProposedAction, proposal.id).expires_at
    desk._end(desk._begin(CALLER, proposal.id), "proposed", "")
    with store.reading() as session:
        row = session.get_one(ProposedAction, proposal.id)
    assert (row.state, row.expires_at) == ("proposed", until)


async def test_a_database_that_is_away_after_the_delivery_makes_no_second_ticket(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    desk = desk_of(store, monkeypatch, sent)
    proposal = await desk.propose(CALLER, "hand_over", {}, [])
    end, failures = desk._end, [UnavailableError("away")] * 2

    def fail_at_first(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        end(*arguments)

    async def at_once(seconds: float) -> None: ...

    monkeypatch.setattr(desk, "_end", fail_at_first)
    monkeypatch.setattr(desk_module.asyncio, "sleep", at_once)
    assert (await desk.confirm(CALLER, proposal.id))[1] == "T-1"
    assert (await desk.confirm(CALLER, proposal.id))[1] == "T-1"
    assert len(sent) == 1


async def test_two_confirmations_at_once_are_carried_out_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    desk = desk_of(store, monkeypatch, sent)
    proposal = await desk.propose(CALLER, "hand_over", {}, [])
    ended = await asyncio.gather(*(desk.confirm(CALLER, proposal.id) for _ in range(8)), return_exceptions=True)
    assert len(sent) == 1
    assert all(isinstance(one, tuple | ConflictError) for one in ended)
