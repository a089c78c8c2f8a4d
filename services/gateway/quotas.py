"""Rate limits and quotas of keys.

Buckets live in this process: with r gateway replicas a key gets up to r times its rate. The daily quota is counted in
the database, over all replicas.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from dataclasses import dataclass, field

from services.gateway.auth.callers import Caller
from services.gateway.store import KeyUse
from steersman.errors import RateLimitedError
from steersman.store.engine import Store

_REFRESH_SECONDS = 10.0
_MOST_BUCKETS = 50_000


@dataclass(slots=True)
class _Bucket:
    """Holds at most one minute's worth; may be overdrawn by an answer that was already given."""

    per_minute: int
    level: float = field(init=False)
    updated: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.level = self.per_minute

    def take(self, amount: float) -> None:
        """Takes what was used."""
        self._fill()
        self.level -= amount

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there; 0 now."""
        self._fill()
        return max(0.0, (amount - self.level) * 60 / self.per_minute)

    def _fill(self) -> None:
        now = time.monotonic()
        self.level = min(self.per_minute, self.level + (now - self.updated) * self.per_minute / 60)
        self.updated = now


@dataclass(slots=True)
class _Day:
    day: dt.date
    tokens: int
    checked: float


class Quotas:
    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}
        self._days: dict[str, _Day] = {}

    async def admit(self, caller: Caller) -> None:
        """Counts a request.

        Raises:
            RateLimitedError: past a limit, with the seconds to wait.
        """
        if caller.requests_per_minute:
            bucket = _bucket(self._requests, caller.key_id, caller.requests_per_minute)
            _refuse(bucket.wait(1), f"This key may make {caller.requests_per_minute} requests a minute")
            bucket.take(1)
        if caller.tokens_per_minute:
            bucket = _bucket(self._tokens, caller.key_id, caller.tokens_per_minute)
            _refuse(bucket.wait(1), f"This key may use {caller.tokens_per_minute} tokens a minute")
        if caller.tokens_per_day:
            used = await self._used_today(caller.key_id)
            if used >= caller.tokens_per_day:
                midnight = dt.datetime.combine(_today() + dt.timedelta(days=1), dt.time(), dt.UTC)
                seconds = (midnight - dt.datetime.now(dt.UTC)).total_seconds()
                _refuse(seconds, f"This key may use {caller.tokens_per_day} tokens a day")

    def charge(self, caller: Caller, tokens: int) -> None:
        """Counts the tokens of an answer."""
        if caller.tokens_per_minute:
            _bucket(self._tokens, caller.key_id, caller.tokens_per_minute).take(tokens)
        day = self._days.get(caller.key_id)
        if day is not None:
            day.tokens += tokens

    async def _used_today(self, key_id: str) -> int:
        today, day = _today(), self._days.get(key_id)
        if day is None or day.day != today or day.checked < time.monotonic() - _REFRESH_SECONDS:
            stored = await asyncio.to_thread(self._load, key_id, today)
            known = day.tokens if day is not None and day.day == today else 0
            day = self._days[key_id] = _Day(today, max(stored, known), time.monotonic())
        return day.tokens

    def _load(self, key_id: str, day: dt.date) -> int:
        if self._store is None:
            return 0
        with self._store.reading() as session:
            use = session.get(KeyUse, (key_id, day))
            return use.tokens if use else 0


def _bucket(buckets: dict[str, _Bucket], key_id: str, per_minute: int) -> _Bucket:
    bucket = buckets.get(key_id)
    if bucket is None or bucket.per_minute != per_minute:
        if len(buckets) >= _MOST_BUCKETS:
            buckets.clear()
        bucket = buckets[key_id] = _Bucket(per_minute)
    return bucket


def _refuse(seconds: float, rule: str) -> None:
    if seconds > 0:
        raise RateLimitedError(f"{rule}; try again in {max(1, round(seconds))} s", retry_after=seconds)


def _today() -> dt.date:
    return dt.datetime.now(dt.UTC).date()
