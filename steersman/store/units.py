"""Counting people instead of events: what a canary, a release or a statistic may decide on.

One unit is a conversation; where there is none, the end customer; where he is unknown, the answer. A unit is bad when
a current verdict on one of its answers is a thumb down. Of one end customer, one network address, one tenant, and of
unknown people within one minute only so many units count, the first ones: what is beyond is shown (`anomalies`), not
counted.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from steersman.store.models import Answer, FeedbackEvent


@dataclass(frozen=True)
class Caps:
    """Units that count of one and the same."""

    end_customer: int = 5
    address: int = 20
    """Of people whom no token or key names, behind one network address."""
    minute: int = 60
    """Of people whom no token or key names, within one minute."""
    tenant: int = 1000


@dataclass(frozen=True)
class Voice:
    """Whose a verdict is, as far as the caps ask."""

    tenant: str
    end_customer: str
    address: str
    known: bool
    """An API key, a login or a verified token names the judge."""
    at: dt.datetime

    @classmethod
    def of(cls, answer: Answer, event: FeedbackEvent) -> Voice:
        known = event.channel != "browser"
        return cls(answer.customer, answer.end_customer, event.origin, known, event.received_at)


class Tally:
    """Which voices count, one after the other in the order of their coming."""

    def __init__(self, caps: Caps) -> None:
        self._caps = caps
        self._heard: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        """(cap, whose) -> voices beyond it."""

    def refusal(self, voice: Voice) -> str | None:
        """The cap that this voice is beyond; None: it counts."""
        groups = {"tenant": voice.tenant}
        if voice.end_customer:
            groups["end_customer"] = f"{voice.tenant}/{voice.end_customer}"
        if not voice.known:
            groups["address"] = voice.address
            groups["minute"] = f"{voice.at:%Y-%m-%d %H:%M}"
        for cap, whose in groups.items():
            if self._heard[cap, whose] >= getattr(self._caps, cap):
                self.refused[cap, whose] += 1
                return cap
        self._heard.update(groups.items())
        return None


@dataclass(frozen=True)
class Units:
    """Verdicts on one deployment."""

    judged: int = 0
    bad: int = 0


@dataclass(frozen=True)
class Anomaly:
    """More of one and the same than counts."""

    deployment: str
    cap: str
    """tenant, end_customer, address or minute."""
    whose: str
    """Tenant, pseudonym or minute."""
    units: int
    """Beyond the cap: shown, not counted."""


def judged_units(
    session: Session, deployments: Sequence[str], since: dt.datetime, caps: Caps = Caps()
) -> dict[str, Units]:
    """Verdicts of people on answers that were given since a time, by deployment.

    Conversations in which several of the deployments answered are left out: nobody knows whom the verdict is about.
    """
    return {name: units for name, (units, _) in _count(session, deployments, since, caps).items()}


def anomalies(session: Session, deployments: Sequence[str], since: dt.datetime, caps: Caps = Caps()) -> list[Anomaly]:
    """What `judged_units` did not count, the most first."""
    found = [
        Anomaly(deployment, cap, whose, n)
        for deployment, (_, tally) in _count(session, deployments, since, caps).items()
        for (cap, whose), n in tally.refused.items()
    ]
    return sorted(found, key=lambda anomaly: (-anomaly.units, anomaly.deployment, anomaly.cap, anomaly.whose))


@dataclass
class _Unit:
    deployment: str
    voice: Voice
    bad: bool = False


def _count(
    session: Session, deployments: Sequence[str], since: dt.datetime, caps: Caps
) -> dict[str, tuple[Units, Tally]]:
    tallies = {name: Tally(caps) for name in deployments}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for unit in _units(session, deployments, since):
        if tallies[unit.deployment].refusal(unit.voice) is None:
            counts[unit.deployment][0] += 1
            counts[unit.deployment][1] += unit.bad
    return {name: (Units(*counts[name]), tallies[name]) for name in deployments}


def _units(session: Session, deployments: Sequence[str], since: dt.datetime) -> Iterable[_Unit]:
    """In the order of their first verdict."""
    mixed = (
        sa.select(Answer.customer, Answer.end_customer, Answer.conversation_id)
        .where(Answer.conversation_id.is_not(None), Answer.deployment.in_(deployments), Answer.created_at >= since)
        .group_by(Answer.customer, Answer.end_customer, Answer.conversation_id)
        .having(sa.func.count(sa.distinct(Answer.deployment)) > 1)
    )
    left_out = {tuple(row) for row in session.execute(mixed)}
    units: dict[tuple[str, ...], _Unit] = {}
    for row in _verdicts(session, deployments, since):
        if row.conversation_id is not None:
            if (row.customer, row.end_customer, row.conversation_id) in left_out:
                continue
            key: tuple[str, ...] = ("conversation", row.customer, row.end_customer, row.conversation_id)
        elif row.end_customer:
            key = ("customer", row.customer, row.end_customer)
        else:
            # `ID.1` is another choice of the same answer.
            key = ("answer", row.answer_id.partition(".")[0])
        at = (row.deployment, *key)
        if at not in units:
            voice = Voice(row.customer, row.end_customer, row.origin, row.channel != "browser", row.received_at)
            units[at] = _Unit(row.deployment, voice)
        units[at].bad |= row.value == "down"
    return units.values()


def _verdicts(session: Session, deployments: Sequence[str], since: dt.datetime) -> Iterator[sa.Row[tuple[str, ...]]]:
    """Current thumbs, oldest first."""
    return iter(
        session.execute(
            sa.select(
                Answer.customer,
                Answer.end_customer,
                Answer.conversation_id,
                Answer.deployment,
                FeedbackEvent.answer_id,
                FeedbackEvent.value,
                FeedbackEvent.channel,
                FeedbackEvent.origin,
                FeedbackEvent.received_at,
            )
            .join(FeedbackEvent, FeedbackEvent.answer_id == Answer.id)
            .where(
                FeedbackEvent.kind == "thumbs",
                FeedbackEvent.current,
                Answer.deployment.in_(deployments),
                Answer.created_at >= since,
            )
            .order_by(FeedbackEvent.id)
            .execution_options(yield_per=1000)
        )
    )
