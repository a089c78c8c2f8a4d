"""Rate limits and quotas of keys, counted in the database over all gateways.

What an answer may cost is reserved before it begins and settled by what it did cost, in the transaction that records
it. A key is refused while what it used and reserved has reached its limit, so at most the quota and one answer pass.
A minute begins with a key's first request in it; when it is over the key is usable again.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from services.gateway.auth.callers import Caller
from services.gateway.leases import LENGTH, Leases, lapsed, moment
from services.gateway.store import KeyUse, KeyWindow, Reservation, insert_new
from steersman.errors import RateLimitedError
from steersman.store.engine import Store
from steersman.store.models import now

_MINUTE = dt.timedelta(minutes=1)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Reserved:
    """Tokens that are set aside for a running answer, by a lease."""

    id: str
    key_id: str
    tokens: int

    def row(self) -> sa.Select[Any]:
        return sa.select(Reservation).where(Reservation.id == self.id)


class Quotas:
    def __init__(self, store: Store, leases: Leases) -> None:
        self._store = store
        self._leases = leases

    async def reserve(self, caller: Caller, tokens: int) -> Reserved | None:
        """Counts a request and sets aside what it may cost; None for a key without limits.

        Raises:
            RateLimitedError: past a limit, with the seconds to wait.
        """
        if not caller.limited:
            return None
        reserved = await asyncio.to_thread(self._reserve, caller, tokens)
        self._leases.hold(reserved)
        return reserved

    def _reserve(self, caller: Caller, tokens: int) -> Reserved:
        reserved = Reserved(secrets.token_hex(16), caller.key_id, tokens)
        with self._store.transaction() as session:
            window = _window(session, caller.key_id)
            void = sa.delete(Reservation).where(
                Reservation.key_id == caller.key_id, lapsed(session, Reservation.expires_at)
            )
            session.execute(void.execution_options(synchronize_session=False))
            running, held = session.execute(
                sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(Reservation.tokens), 0)).where(
                    Reservation.key_id == caller.key_id
                )
            ).one()
            left = (window.began_at + _MINUTE - now()).total_seconds()
            if caller.concurrent and running >= caller.concurrent:
                _refuse(1.0, f"This key may have {caller.concurrent} answers at once")
            if caller.requests_per_minute and window.requests >= caller.requests_per_minute:
                _refuse(left, f"This key may make {caller.requests_per_minute} requests a minute")
            if caller.tokens_per_minute and window.tokens + held >= caller.tokens_per_minute:
                wait = left if window.tokens >= caller.tokens_per_minute else min(left, 5.0)
                _refuse(wait, f"This key may use {caller.tokens_per_minute} tokens a minute")
            for limit, (first, after), span in (
                (caller.tokens_per_day, day_of(now()), "day"),
                (caller.tokens_per_month, month_of(now()), "month"),
            ):
                used = _used_since(session, caller.key_id, first) if limit else 0
                if limit and used + held >= limit:
                    begins = dt.datetime.combine(after, dt.time(), dt.UTC)
                    wait = (begins - now()).total_seconds() if used >= limit else 5.0
                    _refuse(wait, f"This key may use {limit} tokens a {span}")
            window.requests += 1
            until = moment(session, LENGTH)
            session.add(Reservation(id=reserved.id, key_id=reserved.key_id, tokens=tokens, expires_at=until))
        return reserved


def settle(session: Session, settled: Sequence[tuple[Reserved, int]]) -> None:
    """Puts what answers did cost in place of what was set aside for them."""
    spent: dict[str, int] = defaultdict(int)
    for reserved, tokens in settled:
        spent[reserved.key_id] += tokens
    for key_id in sorted(spent):
        _window(session, key_id).tokens += spent[key_id]
    if settled:
        session.execute(sa.delete(Reservation).where(Reservation.id.in_([reserved.id for reserved, _ in settled])))


def day_of(moment: dt.datetime) -> tuple[dt.date, dt.date]:
    """A moment's day, and the first after it."""
    return moment.date(), moment.date() + dt.timedelta(days=1)


def month_of(moment: dt.datetime) -> tuple[dt.date, dt.date]:
    """The first day of a moment's month, and of the next."""
    first = moment.date().replace(day=1)
    return first, (first + dt.timedelta(days=31)).replace(day=1)


def _used_since(session: Session, key_id: str, first: dt.date) -> int:
    tokens = sa.select(sa.func.coalesce(sa.func.sum(KeyUse.tokens), 0)).where(
        KeyUse.key_id == key_id, KeyUse.day >= first
    )
    return int(session.scalar(tokens) or 0)


def _window(session: Session, key_id: str) -> KeyWindow:
    """The key's running minute, held against all others who count for the key."""
    insert_new(session, KeyWindow, {"key_id": key_id, "began_at": now(), "requests": 0, "tokens": 0})
    window = session.get_one(KeyWindow, key_id, with_for_update=True, populate_existing=True)
    if window.began_at + _MINUTE <= now():
        window.began_at, window.requests, window.tokens = now(), 0, 0
    return window


def _refuse(seconds: float, rule: str) -> None:
    seconds = max(seconds, 1.0)
    raise RateLimitedError(f"{rule}; try again in {round(seconds)} s", retry_after=seconds)
