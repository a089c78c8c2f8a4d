"""Writes answers and the audit trail: many records in one transaction, off the event loop."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from services.gateway.auth.callers import Caller
from services.gateway.idempotency import Claim, end_claim
from services.gateway.leases import clock
from services.gateway.quotas import Reserved, settle
from services.gateway.store import Audit, Conversation, KeyUse, storable
from steersman.errors import ConflictError, InternalError, UnavailableError
from steersman.store.engine import Store, add_counts
from steersman.store.models import Answer as StoredAnswer

log = logging.getLogger("steersman.gateway")

_LARGEST_BATCH = 500
_LARGEST_BACKLOG = 20_000
_LARGEST_BYTES = 64 * 1024 * 1024
_RETRY_SECONDS = 1.0
_PROBE_SECONDS = 5.0
_NO_USE = ("refused", "replay", "keys", "forget")
"""Actions that are no use of a key's quota."""
_INSERT_ANSWER = sa.insert(StoredAnswer.__table__)  # type: ignore[arg-type]
_INSERT_AUDIT = sa.insert(Audit.__table__)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Record:
    """What one request leaves behind; dictionaries by column."""

    audit: dict[str, Any] | None = None
    answers: tuple[dict[str, Any], ...] = ()
    """One for every choice."""
    conversation: dict[str, Any] | None = None
    """With `expires_in` in place of `expires_at`."""
    claim: Claim | None = None
    """The right that ends with this request; its key gets `result`, or is free again. Where somebody took it over
    nothing is kept of a result but its line in the trail, and whoever waits gets ConflictError."""
    result: dict[str, Any] | None = None
    reserved: Reserved | None = None
    """What was set aside of a key's quota, and is settled."""
    spent_tokens: int = 0

    @property
    def size(self) -> int:
        """About its bytes."""
        texts = sum(len(row["answer"]) + sum(len(turn["content"]) for turn in row["prompt"]) for row in self.answers)
        packed = sum(len(row.get("token_ids") or b"") + len(row.get("logprobs") or b"") for row in self.answers)
        turns = sum(len(turn["content"]) for turn in self.conversation["turns"]) if self.conversation else 0
        if self.conversation and self.conversation.get("kept"):
            turns *= 2  # the answer and what was said before it, once more
        return 2000 + 2 * texts + packed + turns


@dataclass(slots=True)
class _Entry:
    record: Record
    stored: asyncio.Future[None]
    """For whoever waits; he may have given up."""
    done: bool = False


class Recorder:
    """Group commit: many records in one transaction, in the order of their coming.

    While the database is away, or cannot be written, records wait and the gateway takes no more questions (`failing`).
    A record that the database refuses leaves at least its line in the audit trail.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: list[_Entry] = []
        self._bytes = 0
        self._wake = asyncio.Event()
        # Of its own: key look-ups, pages and name resolution share the default one, and may fill it.
        self._thread = ThreadPoolExecutor(1, "recorder")
        self._closing = False
        self._unsure = False
        """The last transaction ended without an answer: it may have been carried out."""
        self.failing = False
        """The last attempt to store, or to see whether that is possible, failed."""

    @property
    def backlog(self) -> int:
        return len(self._waiting)

    def put(self, record: Record) -> asyncio.Future[None]:
        """Queues a record; the future is done when it is stored.

        Raises UnavailableError when too many wait already.
        """
        if len(self._waiting) >= _LARGEST_BACKLOG or self._bytes > _LARGEST_BYTES or self._closing:
            raise UnavailableError("The gateway's database cannot be reached; try again later")
        stored = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(record, stored))
        self._bytes += record.size
        self._wake.set()
        return stored

    async def run(self) -> None:
        """Writes until `close`; may be begun again after it died: what waited waits."""
        while self._waiting or not self._closing:
            if not self._waiting:
                await self._idle()
                continue
            batch = self._waiting[:_LARGEST_BATCH]
            try:
                await self._store_all(batch)
            except UnavailableError as error:
                self.failing = self._unsure = True
                log.error("answers cannot be stored, trying again: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self.failing = self._unsure = False
            del self._waiting[: len(batch)]
            self._bytes -= sum(entry.record.size for entry in batch)

    async def close(self, seconds: float) -> None:
        """Writes what is waiting, for at most so long; the audit lines of what is left go to the log."""
        self._closing = True
        self._wake.set()
        deadline = asyncio.get_running_loop().time() + seconds
        while self._waiting and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        for entry in self._waiting:
            log.error("a record was not stored before the end", extra={"audit": entry.record.audit})
            _fail(entry.stored, UnavailableError("The gateway's database cannot be reached, this is not stored"))
        self._thread.shutdown(wait=False)

    async def _idle(self) -> None:
        """Waits for a record; sees now and then whether one could be stored."""
        self._wake.clear()
        try:
            async with asyncio.timeout(_RETRY_SECONDS if self.failing else _PROBE_SECONDS):
                await self._wake.wait()
        except TimeoutError:
            try:
                await self._submit(self._store.check_writable)
            except UnavailableError as error:
                if not self.failing:
                    log.error("nothing can be stored: %s", error)
                self.failing = True
            else:
                self.failing = False

    def _submit(self, work: Any, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def _store_all(self, batch: Sequence[_Entry]) -> None:
        """Stores a batch; what the database refuses is found by halving, the others are still stored.

        Raises UnavailableError when the rest of it is to be tried again.
        """
        batch = [entry for entry in batch if not entry.done]
        if not batch:
            return
        work = self._submit(self._store_batch, [entry.record for entry in batch], self._unsure)
        try:
            lost = await asyncio.shield(work)
        except UnavailableError:
            raise
        except asyncio.CancelledError:
            # Whoever ends this task does not end the transaction.
            await asyncio.wait([work])
            if work.exception() is None:
                _finish(batch, work.result())
            raise
        except Exception as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._store_all(batch[:middle])
                await self._store_all(batch[middle:])
                return
            (entry,) = batch
            log.exception("a record cannot be stored", extra={"audit": entry.record.audit})
            await self._store_line(entry.record)
            entry.done = True
            _fail(entry.stored, InternalError(f"The answer cannot be stored ({type(error).__name__})"))
        else:
            _finish(batch, lost)

    async def _store_line(self, record: Record) -> None:
        """Of a record that is refused at least the audit line, and the end of its claims."""
        line = None
        if record.audit is not None:
            line = {name: storable(v) if isinstance(v, str) else v for name, v in record.audit.items()}
            line |= {"outcome": "unrecorded", "records": []}
        bare = Record(line, claim=record.claim, reserved=record.reserved, spent_tokens=record.spent_tokens)
        try:
            await self._submit(self._store_batch, [bare], False)
        except UnavailableError:
            raise
        except Exception:
            log.exception("an audit line cannot be stored", extra={"audit": line})

    def _store_batch(self, records: list[Record], unsure: bool) -> set[Claim]:
        """Returns the claims that somebody took over before their results came.

        `unsure`: some may be stored already, by a transaction whose end was not heard of.
        """
        with self._store.transaction() as session:
            if unsure:
                known = _stored_lines(session, records)
                records = [r for r in records if r.audit is None or (r.audit["request_id"], r.audit["at"]) not in known]
            lost = _end_claims(session, records)
            self._insert(session, [_late(record) if record.claim in lost else record for record in records])
        return lost

    def _insert(self, session: Session, records: Sequence[Record]) -> None:
        use: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
        for record in records:
            if record.audit is None or record.audit["action"] in _NO_USE:
                continue
            counts = use[record.audit["key_id"], record.audit["at"].date()]
            counts[0] += 1
            counts[1] += record.spent_tokens
        answers = [answer for record in records for answer in record.answers]
        conversations = {
            (c["tenant"], c["customer"], c["id"]): c
            for c in (record.conversation for record in records)
            if c is not None
        }
        # Of the tables, not the classes: the mapper's bookkeeping costs more than the insert.
        at = clock(session)
        if answers:
            session.execute(_INSERT_ANSWER, [{**answer, "created_at": at} for answer in answers])
        if lines := [record.audit for record in records if record.audit is not None]:
            session.execute(_INSERT_AUDIT, lines)
        # In one order everywhere, so that two gateways never wait for each other.
        for key in sorted(conversations):
            row = dict(conversations[key])
            session.merge(Conversation(expires_at=at + row.pop("expires_in"), **row))
        add_counts(session, KeyUse, {key: tuple(counts) for key, counts in use.items()})
        settle(session, [(r.reserved, r.spent_tokens) for r in records if r.reserved is not None])


def _stored_lines(session: Session, records: Sequence[Record]) -> set[tuple[str, dt.datetime]]:
    moments = [record.audit["at"] for record in records if record.audit is not None]
    found = session.execute(sa.select(Audit.request_id, Audit.at).where(Audit.at.in_(moments)))
    return {(request_id, at) for request_id, at in found}


def _end_claims(session: Session, records: Sequence[Record]) -> set[Claim]:
    """Before anything else is stored; returns those of results that are another's by now."""
    ending = [(record.claim, record.result) for record in records if record.claim is not None]
    ending.sort(key=lambda entry: (entry[0].scope, entry[0].key))
    return {claim for claim, result in ending if not end_claim(session, claim, result) and result is not None}


def _late(record: Record) -> Record:
    """What is left of an answer whose claim somebody took over: it was computed, and nobody gets it."""
    audit = None if record.audit is None else {**record.audit, "outcome": ConflictError.__name__}
    return replace(record, audit=audit, answers=(), conversation=None)


def _finish(batch: Sequence[_Entry], lost: set[Claim]) -> None:
    for entry in batch:
        entry.done = True
        if entry.record.claim in lost:
            _fail(entry.stored, ConflictError("Another request with this Idempotency-Key took over; ask again"))
        elif not entry.stored.done():
            entry.stored.set_result(None)


def _fail(stored: asyncio.Future[None], error: Exception) -> None:
    if not stored.done():
        stored.set_exception(error)
        stored.exception()  # Whoever waits still gets it; nobody has to.


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
        "origin": "",
        "answer_id": answer_id,
        "records": list(records),
        "weights_version": "",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "milliseconds": 0,
        "first_token_milliseconds": 0,
    } | numbers
