"""Writes answers and the audit trail: many records in one transaction, off the event loop."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.gateway.auth.callers import Caller
from services.gateway.store import Audit, Conversation, KeyUse
from steersman.errors import InternalError, UnavailableError
from steersman.store.engine import Store, add_counts
from steersman.store.models import Answer as StoredAnswer

log = logging.getLogger("steersman.gateway")

_LARGEST_BATCH = 500
_LARGEST_BACKLOG = 20_000
_RETRY_SECONDS = 1.0
_INSERT_ANSWER = sa.insert(StoredAnswer.__table__)  # type: ignore[arg-type]
_INSERT_AUDIT = sa.insert(Audit.__table__)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Record:
    """What one request leaves behind; dictionaries by column."""

    audit: dict[str, Any]
    answers: tuple[dict[str, Any], ...] = ()
    """One for every choice."""
    conversation: dict[str, Any] | None = None


class Recorder:
    """Group commit: many records in one transaction.

    While the database cannot be reached records wait, and the gateway takes no more questions (`failing`).
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: list[tuple[Record, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self.failing = False
        """The last attempt to store met a database that does not answer."""

    @property
    def backlog(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Writes what is waiting."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task

    def put(self, record: Record) -> asyncio.Future[None]:
        """Queues a record; the future is done when it is stored.

        Raises UnavailableError when too many wait already.
        """
        if len(self._waiting) >= _LARGEST_BACKLOG or self._closing:
            raise UnavailableError("The database of the gateway cannot be reached; try again later")
        stored = asyncio.get_running_loop().create_future()
        self._waiting.append((record, stored))
        self._wake.set()
        return stored

    async def _run(self) -> None:
        while self._waiting or not self._closing:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch = self._waiting[:_LARGEST_BATCH]
                try:
                    await self._store_all(batch)
                except (sa.exc.OperationalError, sa.exc.InterfaceError):
                    self.failing = True
                    log.exception("answers cannot be stored, trying again")
                    if self._closing:
                        return
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                self.failing = False
                del self._waiting[: len(batch)]

    async def _store_all(self, batch: list[tuple[Record, asyncio.Future[None]]]) -> None:
        """Stores a batch; when one record is refused by the database, the others are still stored."""
        try:
            await asyncio.to_thread(self._store_batch, [record for record, _ in batch])
        except (sa.exc.OperationalError, sa.exc.InterfaceError):
            raise
        except sa.exc.SQLAlchemyError as error:
            if len(batch) > 1:
                for single in batch:
                    await self._store_all([single])
                return
            record, stored = batch[0]
            log.exception("an answer cannot be stored", extra={"request_id": record.audit["request_id"]})
            if not stored.done():
                stored.set_exception(InternalError(f"The answer cannot be stored ({type(error).__name__})"))
                stored.exception()  # Whoever waits still gets it; nobody has to.
        else:
            for _, stored in batch:
                if not stored.done():
                    stored.set_result(None)

    def _store_batch(self, records: list[Record]) -> None:
        use: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
        for record in records:
            audit = record.audit
            counts = use[audit["key_id"], audit["at"].date()]
            counts[0] += 1
            counts[1] += audit["prompt_tokens"] + audit["completion_tokens"]
        answers = [answer for record in records for answer in record.answers]
        conversations = {
            (c["tenant"], c["customer"], c["id"]): c
            for c in (record.conversation for record in records)
            if c is not None
        }
        with self._store.transaction() as session:
            # Of the tables, not the classes: the mapper's bookkeeping costs more than the insert.
            if answers:
                session.execute(_INSERT_ANSWER, answers)
            session.execute(_INSERT_AUDIT, [record.audit for record in records])
            for conversation in conversations.values():
                session.merge(Conversation(**conversation))
            add_counts(session, KeyUse, {key: tuple(counts) for key, counts in use.items()})  # type: ignore[arg-type]


def audit_row(
    caller: Caller,
    request_id: str,
    action: str,
    outcome: str,
    answer_id: str = "",
    records: Sequence[Any] = (),
    **numbers: Any,
) -> dict[str, Any]:
    """A line of the audit trail, as a row of `Audit`."""
    return {
        "at": dt.datetime.now(dt.UTC),
        "request_id": request_id,
        "action": action,
        "outcome": outcome,
        "tenant": caller.tenant,
        "key_id": caller.key_id,
        "customer": caller.customer_id,
        "answer_id": answer_id,
        "records": list(records),
        "weights_version": "",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "milliseconds": 0,
        "first_token_milliseconds": 0,
    } | numbers
