"""`Idempotency-Key`: a request that is sent again gets the first one's result."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from services.gateway.auth.callers import Caller
from services.gateway.store import Idempotency, insert_new
from steersman.errors import ConflictError, InvalidArgumentError
from steersman.store.engine import Store
from steersman.store.models import now

LIFETIME = dt.timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to carry out a request."""

    scope: str
    key: str
    owner: str
    """Another request may take an old claim over; then this one can neither end nor free it."""


class IdempotencyKeys:
    def __init__(self, store: Store, longest_seconds: float) -> None:
        """`longest_seconds`: no request runs longer; after it one whose gateway died may be repeated."""
        self._store = store
        self._longest = dt.timedelta(seconds=longest_seconds)

    async def claim(self, caller: Caller, route: str, key: str, request: bytes) -> Claim | dict[str, Any]:
        """The right to carry out the request, or the result that it had. The recorder ends it.

        Raises:
            ConflictError: the first request still runs, or was another one.
        """
        if not 1 <= len(key) <= 255 or not key.isprintable():
            raise InvalidArgumentError("Idempotency-Key must have 1 to 255 printable characters")
        parts = [part.encode() for part in (caller.tenant, caller.customer_id, route)]
        scope = hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).hexdigest()
        claim = Claim(scope, key, secrets.token_hex(8))
        return await asyncio.to_thread(self._claim, claim, caller, hashlib.sha256(request).hexdigest())

    async def forget_expired(self) -> None:
        await asyncio.to_thread(self._forget_expired)

    def _claim(self, claim: Claim, caller: Caller, digest: str) -> Claim | dict[str, Any]:
        mine = sa.and_(Idempotency.scope == claim.scope, Idempotency.key == claim.key)
        with self._store.transaction() as session:
            session.execute(sa.delete(Idempotency).where(mine, Idempotency.expires_at < now()))
            row = {
                "scope": claim.scope,
                "key": claim.key,
                "request_digest": digest,
                "result": None,
                "owner": claim.owner,
                "tenant": caller.tenant,
                "customer": caller.customer_id,
                "expires_at": now() + self._longest,
            }
            if insert_new(session, Idempotency, row):
                return claim
            found = session.get_one(Idempotency, (claim.scope, claim.key))
            if found.request_digest != digest:
                raise ConflictError("This Idempotency-Key was used for another request; choose a new one")
            if found.result is None:
                raise ConflictError("The request with this Idempotency-Key is still running; try again later")
            return found.result

    def _forget_expired(self) -> None:
        with self._store.transaction() as session:
            session.execute(sa.delete(Idempotency).where(Idempotency.expires_at < now()))


def end_claim(session: Session, claim: Claim, result: dict[str, Any] | None) -> None:
    """Keeps the result for the next one with this key, or, without one, frees the key."""
    mine = (
        Idempotency.scope == claim.scope,
        Idempotency.key == claim.key,
        Idempotency.owner == claim.owner,
        Idempotency.result.is_(None),
    )
    if result is None:
        session.execute(sa.delete(Idempotency).where(*mine))
    else:
        session.execute(sa.update(Idempotency).where(*mine).values(result=result, expires_at=now() + LIFETIME))
