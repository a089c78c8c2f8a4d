"""The bot's answers and what is said about them later: thumbs, edits, outcomes of business systems.

An event is acknowledged when `submit`'s transaction is left: then it is on disk. Sending it again changes nothing.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from steersman.errors import ConflictError, InvalidArgumentError, NotFoundError
from steersman.store.engine import add_counts
from steersman.store.models import Answer, FeedbackEvent, FeedbackHour, now

Kind = Literal["thumbs", "edit", "outcome"]
_MAX_TEXT = 100_000

#: Outcomes that speak against the answer; any other outcome is only counted.
BAD_OUTCOMES = frozenset({"ticket_reopened", "order_cancelled", "refund", "escalated"})
GOOD_OUTCOMES = frozenset({"ticket_solved", "order_placed"})


@dataclass(frozen=True)
class Event:
    """A judgement of an earlier answer."""

    event_id: str
    """Chosen by the caller, unique within its tenant."""
    answer_id: str
    kind: Kind
    value: str
    """thumbs: up or down; edit: the better answer; outcome: its name, as ticket_reopened."""
    reason: str = ""

    def check(self) -> None:
        """Raises InvalidArgumentError when a field is wrong."""
        if not 0 < len(self.event_id) <= 128:
            raise InvalidArgumentError("event_id: give 1 to 128 characters; it makes the call idempotent")
        if self.kind not in get_args(Kind):
            raise InvalidArgumentError(f"kind: {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if self.kind == "thumbs" and self.value not in ("up", "down"):
            raise InvalidArgumentError(f"thumbs: {self.value!r} is neither up nor down")
        if not self.value.strip():
            raise InvalidArgumentError(f"{self.kind}: the value is empty")
        if self.kind == "outcome" and len(self.value) > 200:
            raise InvalidArgumentError("outcome: name it in at most 200 characters, as ticket_reopened")
        if len(self.value) > _MAX_TEXT or len(self.reason) > _MAX_TEXT:
            raise InvalidArgumentError(f"{self.kind}: longer than {_MAX_TEXT:,} characters")


def save_answer(session: Session, answer: Answer) -> None:
    """Stores an answer, so that feedback can refer to it. Raises ConflictError for an id that exists."""
    if session.get(Answer, answer.id) is not None:
        raise ConflictError(f"answer {answer.id!r} is stored already")
    session.add(answer)
    session.flush()


def submit(session: Session, customer: str, event: Event) -> bool:
    """Stores an event of a tenant; False when it was stored before.

    Raises:
        NotFoundError: no such answer, or it belongs to another tenant.
        ConflictError: the event id was used for another judgement.
        InvalidArgumentError: a field is wrong.
    """
    event.check()
    answer = session.get(Answer, event.answer_id)
    if answer is None or answer.customer != customer:
        raise NotFoundError(f"answer {event.answer_id!r} does not exist")
    row = {
        "customer": customer,
        "event_id": event.event_id,
        "answer_id": event.answer_id,
        "kind": event.kind,
        "value": event.value,
        "reason": event.reason,
        "received_at": now(),
    }
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = insert(FeedbackEvent).values(row).on_conflict_do_nothing(index_elements=["customer", "event_id"])
    if session.scalar(statement.returning(FeedbackEvent.id)) is None:
        stored = session.scalars(
            sa.select(FeedbackEvent).where(FeedbackEvent.customer == customer, FeedbackEvent.event_id == event.event_id)
        ).one()
        if (stored.answer_id, stored.kind, stored.value) != (event.answer_id, event.kind, event.value):
            raise ConflictError(f"event {event.event_id!r} was stored with another judgement; use a new event id")
        return False
    hour = row["received_at"].replace(minute=0, second=0, microsecond=0)  # type: ignore[attr-defined]
    counted = "edit" if event.kind == "edit" else event.value
    add_counts(session, FeedbackHour, {(answer.deployment, hour, event.kind, counted): (1,)})
    return True


def feedback_counts(session: Session, deployment: str, since: dt.datetime) -> Counter[tuple[str, str]]:
    """(kind, value) -> events of a deployment since (the full hour of) a time: what a rollback decides on."""
    rows = session.execute(
        sa.select(FeedbackHour.kind, FeedbackHour.value, sa.func.sum(FeedbackHour.n))
        .where(
            FeedbackHour.deployment == deployment,
            FeedbackHour.hour >= since.replace(minute=0, second=0, microsecond=0),
        )
        .group_by(FeedbackHour.kind, FeedbackHour.value)
    )
    return Counter({(kind, value): int(n) for kind, value, n in rows})


def preference_rows(session: Session) -> Iterator[dict[str, Any]]:
    """Answers that a person edited, as preferences: the last edit over the answer."""
    for answer, events in _answers_with(session, ("edit",)):
        yield _origin(answer) | {
            "chosen": [{"role": "assistant", "content": events[-1].value}],
            "rejected": [{"role": "assistant", "content": answer.answer}],
        }


def feedback_rows(session: Session) -> Iterator[dict[str, Any]]:
    """Answers with a thumb or a telling outcome, as labelled rows.

    The last thumb decides; without one, outcomes do, and a bad one outweighs a good one.
    """
    for answer, events in _answers_with(session, ("thumbs", "outcome")):
        thumbs = [event.value for event in events if event.kind == "thumbs"]
        outcomes = {event.value for event in events if event.kind == "outcome"}
        if thumbs:
            label = thumbs[-1] == "up"
        elif outcomes & (BAD_OUTCOMES | GOOD_OUTCOMES):
            label = not outcomes & BAD_OUTCOMES
        else:
            continue
        yield _origin(answer) | {
            "completion": [{"role": "assistant", "content": answer.answer}],
            "label": label,
        }


def _answers_with(session: Session, kinds: tuple[str, ...]) -> Iterator[tuple[Answer, list[FeedbackEvent]]]:
    """Answers with events of these kinds, and those events, oldest first."""
    rows = session.execute(
        sa.select(Answer, FeedbackEvent)
        .join(FeedbackEvent, FeedbackEvent.answer_id == Answer.id)
        .where(FeedbackEvent.kind.in_(kinds))
        .order_by(Answer.created_at, Answer.id, FeedbackEvent.id)
        .execution_options(yield_per=500)
    )
    current: Answer | None = None
    events: list[FeedbackEvent] = []
    for answer, event in rows:
        if current is not None and answer.id != current.id:
            yield current, events
            events = []
        current = answer
        events.append(event)
    if current is not None:
        yield current, events


def _origin(answer: Answer) -> dict[str, Any]:
    row = {
        "id": f"answer:{answer.id}",
        "source": "feedback",
        "customer": answer.customer or None,
        "consent": answer.consent,
        "model": answer.model or None,
        "prompt": answer.prompt,
    }
    return {name: value for name, value in row.items() if value is not None}
