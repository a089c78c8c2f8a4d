"""Rows that a gateway holds while it works, each until a moment that it puts off again and again.

When the gateway dies the moment is soon over, and anybody may take the row over. A gateway that froze, or did not reach
its database, can come back after that: it must find its row in the transaction that ends its work.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.orm import InstrumentedAttribute, Session

from steersman.errors import UnavailableError
from steersman.store.engine import Store
from steersman.store.models import now

log = logging.getLogger("steersman.gateway")

LENGTH = dt.timedelta(seconds=30)
_RENEW_SECONDS = 10.0


class Lease(Protocol):
    def row(self) -> sa.Select[Any]:
        """The row while it is held; its column `expires_at` is the lease."""
        ...


class Leases:
    """Renews what is held. Whatever nobody refers to any more is held no longer."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._held: weakref.WeakSet[Lease] = weakref.WeakSet()

    def hold(self, lease: Lease) -> None:
        self._held.add(lease)

    async def run(self) -> None:
        """Renews for ever; may be begun again."""
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            await self.renew()

    async def renew(self) -> None:
        held = list(self._held)
        if not held:
            return
        try:
            await asyncio.to_thread(self._renew, held)
        except UnavailableError as error:
            log.warning("%d running requests may be taken over, their leases are not renewed: %s", len(held), error)

    def _renew(self, held: Sequence[Lease]) -> None:
        with self._store.transaction() as session:
            for lease in held:
                # Who has it locked is just ending it; waiting for one after the other could end in a deadlock.
                row = session.scalars(lease.row().with_for_update(skip_locked=True)).first()
                if row is not None:
                    row.expires_at = moment(session, LENGTH)


def moment(session: Session, later: dt.timedelta = dt.timedelta()) -> Any:
    """The time by the database's clock, for gateways' clocks differ and jump; SQLite's is the machine's."""
    if session.get_bind().dialect.name == "postgresql":
        return sa.func.statement_timestamp(type_=sa.DateTime(timezone=True)) + later
    session.connection()  # begins, and so waits for other writers, before the clock is read
    return now() + later


def clock(session: Session) -> dt.datetime:
    """`moment` as a value."""
    found = moment(session)
    if not isinstance(found, dt.datetime):
        found = session.scalar(sa.select(found))
    assert isinstance(found, dt.datetime)
    return found


def lapsed(session: Session, until: InstrumentedAttribute[dt.datetime]) -> sa.ColumnElement[bool]:
    """Whether a lease is over. On SQLite also one that cannot be: the machine's clock was put back meanwhile."""
    over: sa.ColumnElement[bool] = until < moment(session)
    if session.get_bind().dialect.name == "sqlite":
        over = sa.or_(over, until > moment(session, LENGTH))
    return over
