"""`Idempotency-Key`: a request that is sent again gets the first one's result."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.gateway.store import Idempotency, insert_new
from steersman.errors import ConflictError, InvalidArgumentError
from steersman.store.engine import Store
from steersman.store.models import now

_LIFETIME = dt.timedelta(hours=24)
_LONGEST_RUN = dt.timedelta(minutes=15)
"""After it a request whose gateway died may be repeated."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to carry out a request."""

    scope: str
    key: str


class IdempotencyKeys:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def claim(self, scope: str, key: str, request: bytes) -> Claim | dict[str, Any]:
        """The right to carry out the request, or the result that it had.

        Raises:
            ConflictError: the first request still runs, or was another one.
        """
        if not 1 <= len(key) <= 255 or not key.isprintable():
            raise InvalidArgumentError("Idempotency-Key must have 1 to 255 printable characters")
        digest = hashlib.sha256(request).hexdigest()
        return await asyncio.to_thread(self._claim, Claim(scope, key), digest)

    async def complete(self, claim: Claim, result: dict[str, Any]) -> None:
        await asyncio.to_thread(self._complete, claim, result)

    async def release(self, claim: Claim) -> None:
        """The request failed and may be sent again."""
        await asyncio.to_thread(self._release, claim)

    def _claim(self, claim: Claim, digest: str) -> Claim | dict[str, Any]:
        with self._store.transaction() as session:
            session.execute(sa.delete(Idempotency).where(Idempotency.expires_at < now()))
            row = {
                "scope": claim.scope,
                "key": claim.key,
                "request_digest": digest,
                "result": None,
                "expires_at": now() + _LONGEST_RUN,
            }
            if insert_new(session, Idempotency, row):
                return claim
            found = session.get_one(Idempotency, (claim.scope, claim.key))
            if found.request_digest != digest:
                raise ConflictError("This Idempotency-Key was used for another request; choose a new one")
            if found.result is None:
                raise ConflictError("The request with this Idempotency-Key is still running; try again later")
            return found.result

    def _complete(self, claim: Claim, result: dict[str, Any]) -> None:
        with self._store.transaction() as session:
            found = session.get(Idempotency, (claim.scope, claim.key))
            if found is not None:
                found.result = result
                found.expires_at = now() + _LIFETIME

    def _release(self, claim: Claim) -> None:
        with self._store.transaction() as session:
            session.execute(
                sa.delete(Idempotency).where(
                    Idempotency.scope == claim.scope, Idempotency.key == claim.key, Idempotency.result.is_(None)
                )
            )
