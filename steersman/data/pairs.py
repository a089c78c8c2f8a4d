"""From verdicts and ratings to preference pairs: pure functions.

A pair of answers gets the share p of labelers who preferred its first one (a tie is half a vote). p > 1/2 puts the
first one in `chosen`; p = 1/2 is a tie. The margin is the absolute mean distance: ranks apart for a ranking, the
stated strength (1-3) for a comparison, the difference of values (`steersman.data.aspects`) for ratings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from steersman.data.aspects import Rule
from steersman.data.format import Skip

TieRule = Literal["drop", "keep"]
DisagreementRule = Literal["majority", "soft", "drop"]


@dataclass(frozen=True, slots=True)
class Preferred:
    """What the labelers of an item think of two of its answers."""

    chosen: int
    rejected: int
    share: float
    """Share of votes for `chosen`, at least 1/2."""
    margin: float

    @property
    def tie(self) -> bool:
        return self.share == 0.5


def preferences(verdicts: Sequence[Mapping[str, Any]]) -> Iterator[Preferred]:
    """All pairs of the answers that the given rankings name, best-supported side first."""
    placed = [
        ({answer: at for at, group in enumerate(verdict["ranking"]) for answer in group}, verdict.get("strength") or 1)
        for verdict in verdicts
        if verdict.get("ranking") and not verdict.get("skip")
    ]
    if not placed:
        return
    for one, two in combinations(sorted(placed[0][0]), 2):
        apart = [(place[two] - place[one]) * strength for place, strength in placed]
        share = sum((distance > 0) + 0.5 * (distance == 0) for distance in apart) / len(apart)
        margin = abs(sum(apart)) / len(apart)
        yield Preferred(one, two, share, margin) if share >= 0.5 else Preferred(two, one, 1 - share, margin)


def mean_ratings(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each aspect over the labelers who rated."""
    rated = [verdict["ratings"] for verdict in verdicts if verdict.get("ratings") and not verdict.get("skip")]
    if not rated:
        return {}
    return {aspect: sum(ratings[aspect] for ratings in rated) / len(rated) for aspect in rated[0]}


def rated_pairs(rows: Sequence[Mapping[str, Any]], rule: Rule) -> Iterator[Preferred | Skip]:
    """All pairs of rated answers to one prompt, by their values over the aspects that both were rated in."""
    for one, two in combinations(range(len(rows)), 2):
        both = rows[one]["aspects"].keys() & rows[two]["aspects"].keys()
        first, second = (rule.value(rows[at], both) for at in (one, two))
        if first is None or second is None:
            missing = ", ".join(sorted(rule.limits.keys() - both))
            yield Skip(
                f"two answers of which one has no rating of {missing}, which has a limit"
                if missing
                else "two answers without an aspect that counts in common"
            )
            continue
        apart = first - second
        share = 0.5 if abs(apart) < 1e-9 else 1.0
        yield Preferred(one, two, share, apart) if apart >= 0 else Preferred(two, one, share, -apart)


def keep(
    found: Iterable[Preferred | Skip], ties: TieRule, disagreement: DisagreementRule
) -> Iterator[tuple[Preferred | Skip, float | None]]:
    """Applies the rules: (pair, soft label or None), or (reason for leaving it out, None)."""
    for pair in found:
        if isinstance(pair, Skip):
            yield pair, None
        elif pair.tie and ties == "drop":
            yield Skip("tie"), None
        elif pair.share < 1 and not pair.tie and disagreement == "drop":
            yield Skip("labelers disagree"), None
        else:
            soft = pair.share < 1 and (disagreement == "soft" or pair.tie)
            yield pair, pair.share if soft else None
