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
from services.gateway.leases import LENGTH, Leases, lapsed, moment
from services.gateway.store import Idempotency, insert_new
from steersman.errors import ConflictError, InvalidArgumentError
from steersman.store.engine import Store

LIFETIME = dt.timedelta(hours=24)
_FORGOTTEN = dt.timedelta(hours=1)
"""Claims that ended so long ago are nobody's: one that was not renewed for a while may still come to its end."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Claim:
    """The right to carry out a request, by a lease."""

    scope: str
    key: str
    owner: str
    """Another request may take a lapsed claim over; then this one can neither end nor free it."""

    def row(self) -> sa.Select[Any]:
        return sa.select(Idempotency).where(self.mine)

    @property
    def mine(self) -> sa.ColumnElement[bool]:
        owned = (Idempotency.scope == self.scope, Idempotency.key == self.key, Idempotency.owner == self.owner)
        return sa.and_(*owned, Idempotency.result.is_(None))


class IdempotencyKeys:
    def __init__(self, store: Store, leases: Leases) -> None:
        self._store = store
        self._leases = leases

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
        found = await asyncio.to_thread(self._claim, claim, caller, hashlib.sha256(request).hexdigest())
        if found is claim:
            self._leases.hold(claim)
        return found

    async def forget_expired(self) -> None:
        await asyncio.to_thread(self._forget_expired)

    def _claim(self, claim: Claim, caller: Caller, digest: str) -> Claim | dict[str, Any]:
        mine = (Idempotency.scope == claim.scope, Idempotency.key == claim.key)
        with self._store.transaction() as session:
            old = Idempotency.expires_at < moment(session)
            left = sa.and_(Idempotency.result.is_(None), lapsed(session, Idempotency.expires_at))
            _delete(session, *mine, sa.or_(old, left))
            row = {
                "scope": claim.scope,
                "key": claim.key,
                "request_digest": digest,
                "result": None,
                "owner": claim.owner,
                "tenant": caller.tenant,
                "customer": caller.customer_id,
                "expires_at": moment(session, LENGTH),
            }
            if insert_new(session, Idempotency, row):
                return claim
            found = session.get(Idempotency, (claim.scope, claim.key))
            if found is not None and found.request_digest != digest:
                raise ConflictError("This Idempotency-Key was used for another request; choose a new one")
            if found is None or found.result is None:  # none: it was given back at this moment
                raise ConflictError("The request with this Idempotency-Key is still running; try again later")
            return found.result

    def _forget_expired(self) -> None:
        with self._store.transaction() as session:
            old = sa.and_(Idempotency.result.is_not(None), Idempotency.expires_at < moment(session))
            _delete(session, sa.or_(old, Idempotency.expires_at < moment(session, -_FORGOTTEN)))


def end_claim(session: Session, claim: Claim, result: dict[str, Any] | None) -> bool:
    """Keeps the result for the next one with this key, or, without one, frees the key.

    False: somebody took the claim over, and this result must not be given to anybody.
    """
    ended: Any = sa.delete(Idempotency)
    if result is not None:
        ended = sa.update(Idempotency).values(result=result, expires_at=moment(session, LIFETIME))
    ended = ended.where(claim.mine).returning(Idempotency.key).execution_options(synchronize_session=False)
    return session.execute(ended).first() is not None


def _delete(session: Session, *which: sa.ColumnElement[bool]) -> None:
    session.execute(sa.delete(Idempotency).where(*which).execution_options(synchronize_session=False))
