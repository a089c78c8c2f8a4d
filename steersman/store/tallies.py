"""Keeping the counts of the statistics in step with the judgements.

A judgement that comes or goes changes, in the same transaction:
- `UnitPattern`: its item moves from one pattern of votes to another,
- `VotePair` and `AgreementDay`: its votes are paired with those of the other labelers of the item,
- `LabelerDay`: the labeler's own figures.
Honeypots count for the labeler only: their answers are known, so agreement on them says nothing about the rest.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from steersman.data.agreement import Pattern
from steersman.store.engine import add_counts
from steersman.store.models import AgreementDay, LabelerDay, UnitPattern, VotePair
from steersman.store.verdicts import is_right, votes


@dataclass(frozen=True, slots=True)
class Judged:
    """The parts of a judgement that statistics use."""

    labeler_id: int
    verdict: Mapping[str, Any]
    shown: list[int]
    seconds: float
    created_at: dt.datetime


def encode_patterns(units: Iterable[Mapping[int, int]]) -> str:
    """Votes by value of an item's units as text: [{0: 2, 2: 1}, {1: 3}] is "0:2,2:1|1:3"; units have no order."""
    texts = (",".join(f"{value}:{count}" for value, count in sorted(counts.items()) if count) for counts in units)
    return "|".join(sorted(filter(None, texts)))


def decode_patterns(text: str) -> tuple[Pattern, ...]:
    """The pattern of each unit of an item."""
    return tuple(
        tuple((float(value), int(count)) for value, _, count in (part.partition(":") for part in unit.split(",")))
        for unit in text.split("|")
    )


@dataclass
class Tallies:
    """Changes of the counts, gathered in memory and written at once."""

    project_id: int
    patterns: Counter[tuple[str, str]] = field(default_factory=Counter)
    pairs: Counter[tuple[str, int, int, int, int]] = field(default_factory=Counter)
    days: dict[tuple[str, dt.date], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    labelers: dict[tuple[int, dt.date], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0] * 8))

    def change(self, judged: Judged, others: Iterable[Judged], expected: Mapping[str, Any] | None, sign: int) -> None:
        """Counts a judgement in (sign 1) or out (-1).

        Args:
            judged: The judgement that comes or goes.
            others: The current judgements of the same item by other labelers.
            expected: The right verdict where the item is a honeypot.
            sign: 1 or -1.
        """
        self._count_labeler(judged, expected, sign)
        if expected is None:
            self._count_agreement(judged, list(others), sign)

    def _count_labeler(self, judged: Judged, expected: Mapping[str, Any] | None, sign: int) -> None:
        verdict = judged.verdict
        ranking = verdict.get("ranking") or []
        decided = len(ranking) == 2 and len(judged.shown) == 2 and not verdict.get("skip")
        figures = (
            1,
            bool(verdict.get("skip")),
            bool(verdict.get("unsafe")),
            round(judged.seconds * 1000),
            decided,
            decided and ranking[0][0] == judged.shown[0],
            expected is not None,
            expected is not None and is_right(dict(verdict), dict(expected)),
        )
        row = self.labelers[judged.labeler_id, judged.created_at.date()]
        for at, figure in enumerate(figures):
            row[at] += sign * int(figure)

    def _count_agreement(self, judged: Judged, others: list[Judged], sign: int) -> None:
        theirs = [({(vote.question, vote.unit): vote.value for vote in votes(dict(o.verdict))}, o) for o in others]
        units: dict[str, list[tuple[Counter[int], Counter[int]]]] = defaultdict(list)
        for vote in votes(dict(judged.verdict)):
            unit = (vote.question, vote.unit)
            counts = Counter(cast[unit] for cast, _ in theirs if unit in cast)
            more = counts + Counter([vote.value])
            units[vote.question].append((counts, more) if sign > 0 else (more, counts))
            for cast, other in theirs:
                if unit in cast:
                    first, second = sorted([(judged.labeler_id, vote.value), (other.labeler_id, cast[unit])])
                    self.pairs[vote.question, first[0], second[0], first[1], second[1]] += sign
                    day = self.days[vote.question, max(judged.created_at, other.created_at).date()]
                    day[0] += sign
                    day[1] += sign * (vote.value == cast[unit])
        for question, changes in units.items():
            for pattern, n in zip(map(encode_patterns, zip(*changes, strict=True)), (-1, 1), strict=True):
                if pattern:
                    self.patterns[question, pattern] += n

    def write(self, session: Session) -> None:
        """Adds the changes to the tables."""
        project = self.project_id
        add_counts(session, UnitPattern, {(project, *key): (n,) for key, n in self.patterns.items()})
        add_counts(session, VotePair, {(project, *key): (n,) for key, n in self.pairs.items()})
        add_counts(session, AgreementDay, {(project, *key): tuple(row) for key, row in self.days.items()})
        add_counts(session, LabelerDay, {(project, *key): tuple(row) for key, row in self.labelers.items()})


def disagreement(judged: Iterable[Judged]) -> float | None:
    """Share of disagreeing pairs of votes on one item; None when nothing can be paired."""
    units: dict[tuple[str, int], list[int]] = defaultdict(list)
    for judgement in judged:
        for vote in votes(dict(judgement.verdict)):
            units[vote.question, vote.unit].append(vote.value)
    pairs = agreeing = 0
    for values in units.values():
        pairs += len(values) * (len(values) - 1) // 2
        agreeing += sum(count * (count - 1) // 2 for count in Counter(values).values())
    return 1 - agreeing / pairs if pairs else None
