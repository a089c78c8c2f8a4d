"""The bot's answers and what is said about them later: thumbs, edits, outcomes of business systems.

An event is acknowledged when `submit`'s transaction is left: then it is on disk. Sending it again changes nothing.
Every event stays; what counts is the latest of each judge on each answer. What decides anything counts people, not
events: see `steersman.store.units`.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from steersman.data.format import Skip
from steersman.data.returns import conversation
from steersman.data.rules import Lookups
from steersman.errors import ConflictError, InvalidArgumentError, NotFoundError, RateLimitedError
from steersman.store.models import Answer, FeedbackChannel, FeedbackEvent, FeedbackKind, now
from steersman.store.quoted import Quotes
from steersman.store.units import Caps, Tally, Voice

Kind = FeedbackKind
_MAX_TEXT = 100_000
#: Events on one answer, by whomever.
MOST_EVENTS = 1000

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")

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
        for name in ("event_id", "answer_id", "value", "reason"):
            if _UNSTORABLE.search(getattr(self, name)):
                raise InvalidArgumentError(f"{name}: holds NUL or half a character (a lone surrogate); leave it out")
        if len(self.value) > _MAX_TEXT or len(self.reason) > _MAX_TEXT:
            raise InvalidArgumentError(f"{self.kind}: longer than {_MAX_TEXT:,} characters")


Channel = FeedbackChannel


@dataclass(frozen=True)
class Judge:
    """Who says it."""

    channel: Channel = "application"
    """browser: whoever holds the answer's token; application: with an API key; staff: a person who logged in."""
    id: str = ""
    """The same for everything that one person says; empty: one unknown person."""
    origin: str = ""
    """Pseudonym of the network address."""


def save_answer(session: Session, answer: Answer) -> None:
    """Stores an answer, so that feedback can refer to it. Raises ConflictError for an id that exists."""
    if session.get(Answer, answer.id) is not None:
        raise ConflictError(f"answer {answer.id!r} is stored already")
    session.add(answer)
    session.flush()


def submit(session: Session, customer: str, event: Event, judge: Judge = Judge()) -> bool:
    """Stores an event of a tenant; False when it was stored before.

    It takes the place of what this judge said about this answer before.

    Raises:
        NotFoundError: no such answer, or it belongs to another tenant.
        ConflictError: the event id was used for another judgement.
        RateLimitedError: too much was said about this answer already.
        InvalidArgumentError: a field is wrong.
    """
    event.check()
    # Two verdicts on one answer come one after the other.
    answer = session.get(Answer, event.answer_id, with_for_update=True)
    if answer is None or answer.customer != customer:
        raise NotFoundError(f"answer {event.answer_id!r} does not exist")
    stored = session.scalars(
        sa.select(FeedbackEvent).where(FeedbackEvent.customer == customer, FeedbackEvent.event_id == event.event_id)
    ).one_or_none()
    if stored is None:
        same = [FeedbackEvent.answer_id == event.answer_id, FeedbackEvent.kind == event.kind]
        if event.kind == "outcome":
            same.append(FeedbackEvent.value == event.value)
        about = sa.select(sa.func.count()).select_from(FeedbackEvent).where(FeedbackEvent.answer_id == event.answer_id)
        if session.scalars(about).one() >= MOST_EVENTS:
            raise RateLimitedError(
                f"answer {event.answer_id!r} was judged {MOST_EVENTS} times; nothing more is taken", retry_after=3600
            )
        row = {
            "customer": customer,
            "event_id": event.event_id,
            "answer_id": event.answer_id,
            "kind": event.kind,
            "value": event.value,
            "reason": event.reason,
            "channel": judge.channel,
            "judge": judge.id,
            "origin": judge.origin,
            "current": True,
            "received_at": now(),
        }
        insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
        statement = insert(FeedbackEvent).values(row).on_conflict_do_nothing(index_elements=["customer", "event_id"])
        new = session.scalar(statement.returning(FeedbackEvent.id))
        if new is not None:
            mine = [FeedbackEvent.channel == judge.channel, FeedbackEvent.judge == judge.id, FeedbackEvent.id != new]
            session.execute(sa.update(FeedbackEvent).where(*same, *mine).values(current=False))
            return True
        # The same event id came with another answer at this moment.
        stored = session.scalars(
            sa.select(FeedbackEvent).where(FeedbackEvent.customer == customer, FeedbackEvent.event_id == event.event_id)
        ).one()
    if (stored.answer_id, stored.kind, stored.value) != (event.answer_id, event.kind, event.value):
        raise ConflictError(f"event {event.event_id!r} was stored with another judgement; use a new event id")
    return False


def feedback_counts(session: Session, deployment: str, since: dt.datetime) -> Counter[tuple[str, str]]:
    """(kind, value) -> current events on a deployment's answers since a time; edits count under the value "edit".

    To look at, not to decide on: one person may stand behind many. Decisions are made on
    `steersman.store.units.judged_units`.
    """
    value = sa.case((FeedbackEvent.kind == "edit", "edit"), else_=FeedbackEvent.value)
    rows = session.execute(
        sa.select(FeedbackEvent.kind, value, sa.func.count())
        .join(Answer, Answer.id == FeedbackEvent.answer_id)
        .where(FeedbackEvent.current, Answer.deployment == deployment, FeedbackEvent.received_at >= since)
        .group_by(FeedbackEvent.kind, value)
    )
    return Counter({(kind, said): int(n) for kind, said, n in rows})


def preference_rows(
    session: Session, *, browser_edits: bool = False, lookups: Lookups = "leave-out"
) -> Iterator[dict[str, Any] | Skip]:
    """Answers that a person edited, as preferences: the last edit over the answer.

    Args:
        browser_edits: Also edits by whoever held an answer's token; they may come from anybody.
        lookups: What becomes of answers that rest on looked-up records.
    """
    quotes = Quotes(session, lookups)
    for answer, events in _answers_with(session, ("edit",)):
        edits = [event for event in events if browser_edits or event.channel != "browser"]
        if not edits:
            continue
        prompt = quotes.prompt(answer)
        if isinstance(prompt, Skip):
            yield prompt
            continue
        yield _origin(answer, prompt) | {
            "chosen": [{"role": "assistant", "content": edits[-1].value}],
            "rejected": [{"role": "assistant", "content": answer.answer}],
        }


def feedback_rows(session: Session, *, lookups: Lookups = "leave-out") -> Iterator[dict[str, Any] | Skip]:
    """Answers with a thumb or a telling outcome, as labelled rows; see `_labelled`."""
    for found in _labelled(session, lookups):
        yield found if isinstance(found, Skip) else found.row | {"label": found.good}


def return_rows(session: Session, *, lookups: Lookups = "leave-out") -> Iterator[dict[str, Any] | Skip]:
    """The same as returns: a thumb is about its answer, an outcome about everything the assistant had said by then."""
    for found in _labelled(session, lookups):
        if isinstance(found, Skip):
            yield found
            continue
        turns = conversation([*found.row["prompt"], *found.row["completion"]]) if found.by_outcome else {}
        yield found.row | turns | {"reward": 1.0 if found.good else -1.0}


@dataclass(frozen=True)
class _Labelled:
    row: dict[str, Any]
    """With `prompt` and `completion`."""
    good: bool
    by_outcome: bool
    """What became of the conversation decided, not a thumb."""


def _labelled(session: Session, lookups: Lookups) -> Iterator[_Labelled | Skip]:
    """Answers with a thumb or a telling outcome.

    The last thumb decides, of staff and applications before browsers; without one, outcomes do, and a bad one outweighs
    a good one. Of one end customer, address or tenant as many rows are given as `Caps` allows. `lookups` as for
    `preference_rows`.
    """
    quotes = Quotes(session, lookups)
    tally = Tally(Caps())
    for answer, events in _answers_with(session, ("thumbs", "outcome")):
        thumbs = [event for event in events if event.kind == "thumbs"]
        known = [event for event in thumbs if event.channel != "browser"]
        outcomes = {event.value for event in events if event.kind == "outcome"}
        if thumbs:
            label = (known or thumbs)[-1].value == "up"
        elif outcomes & (BAD_OUTCOMES | GOOD_OUTCOMES):
            label = not outcomes & BAD_OUTCOMES
        else:
            continue
        prompt = quotes.prompt(answer)
        if isinstance(prompt, Skip):
            yield prompt
            continue
        deciding = (known or thumbs or events)[-1]
        if tally.refusal(Voice.of(answer, deciding)) is not None:
            continue
        row = _origin(answer, prompt) | {"completion": [{"role": "assistant", "content": answer.answer}]}
        yield _Labelled(row, label, by_outcome=not thumbs)


def _answers_with(session: Session, kinds: tuple[str, ...]) -> Iterator[tuple[Answer, list[FeedbackEvent]]]:
    """Answers with current events of these kinds, and those events, oldest first."""
    rows = session.execute(
        sa.select(Answer, FeedbackEvent)
        .join(FeedbackEvent, FeedbackEvent.answer_id == Answer.id)
        .where(FeedbackEvent.kind.in_(kinds), FeedbackEvent.current)
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


def _origin(answer: Answer, prompt: list[dict[str, Any]]) -> dict[str, Any]:
    row = {
        "id": f"answer:{answer.id}",
        "source": "feedback",
        "customer": answer.customer or None,
        "end_customer": answer.end_customer or None,
        # Of living people's words: who was not asked has not agreed.
        "consent": answer.consent is True,
        "model": answer.model or None,
        "prompt": prompt,
    }
    return {name: value for name, value in row.items() if value is not None}
