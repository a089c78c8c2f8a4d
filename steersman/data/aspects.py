"""What ratings of several aspects say about an answer as a whole: one rule for releases, honeypots and reward models.

    score = 4 sum_a w_a * u_a / sum_a |w_a|,    u_a = (rating - low) / (high - low) in [0, 1] by the aspect's scale

A weight's sign is the aspect's direction: -1 says that less is better. Without weights of one's own every aspect counts
as 1, but length and complexity, which are no virtues, count as 0 and harm as -1. Where some aspects must reach a limit
before anything else counts, `Rule` decides as a reward model with thresholds does (`steersman.nn.reward.decided`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from steersman.errors import DataError

Scales = Mapping[str, Sequence[float]]
Decide = Literal["sum", "threshold", "lexicographic"]

#: The platform's own ratings.
OWN_SCALE = (1.0, 5.0)
_NO_VIRTUES = ("verbosity", "complexity", "length")
_HARMS = ("toxicity", "harm", "harmfulness", "unsafe", "rudeness")


def default_weight(aspect: str) -> float:
    """Weight of an aspect that nobody gave one."""
    name = aspect.casefold()
    return 0.0 if name in _NO_VIRTUES else -1.0 if name in _HARMS else 1.0


def weights_of(aspects: Iterable[str], given: Mapping[str, float]) -> dict[str, float]:
    """The weight of each aspect: those given, where some are given, else the defaults."""
    return {name: given.get(name, 0.0) if given else default_weight(name) for name in aspects}


def unit_rating(aspect: str, rating: float, scales: Scales | None) -> float:
    """A rating in [0, 1] by its scale; without one by the platform's own, 1 to 5.

    Raises DataError for a rating outside its scale.
    """
    low, high = (scales or {}).get(aspect, OWN_SCALE)
    if not low <= rating <= high or low == high:
        hint = "" if scales and aspect in scales else "; give the row its scales, as {'" + aspect + "': [0, 4]}"
        raise DataError(f"aspect {aspect}: {rating:g} is outside {low:g} to {high:g}{hint}")
    return (rating - low) / (high - low)


def on_scale(aspect: str, rating: float, scales: Scales | None, wanted: Sequence[float]) -> float:
    """A rating on another scale, as it is where that is its own.

    Raises DataError for a rating outside its scale.
    """
    if tuple((scales or {}).get(aspect, OWN_SCALE)) == tuple(wanted):
        return rating
    low, high = wanted
    return low + unit_rating(aspect, rating, scales) * (high - low)


def own_rating(aspect: str, rating: float, scales: Scales | None) -> int:
    """The nearest step of the platform's own scale; without a scale a rating is taken for one of it."""
    low, high = OWN_SCALE
    if aspect not in (scales or {}):
        return round(min(max(rating, low), high))
    return round(low + unit_rating(aspect, rating, scales) * (high - low))


def score(row: Mapping[str, Any], among: Iterable[str], given: Mapping[str, float]) -> float | None:
    """The score of a rated answer over some of its aspects, in steps of the platform's own scale (a range of 4); None
    when none of them has a weight.

    Args:
        row: `aspects`, and `scales` where they are not 1 to 5.
        among: Aspects to look at; answers are comparable over those that all of them were rated in.
        given: Weights, see `weights_of`.
    """
    weights = {name: weight for name, weight in weights_of(among, given).items() if weight}
    if not weights:
        return None
    scales = row.get("scales")
    total = sum(
        weight * unit_rating(name, float(row["aspects"][name]), scales) for name, weight in sorted(weights.items())
    )
    return (OWN_SCALE[1] - OWN_SCALE[0]) * total / sum(abs(weight) for weight in weights.values())


@dataclass(frozen=True)
class Rule:
    """How the ratings of an answer become one number, alike in releases and returns."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """See `weights_of`."""
    decide: Decide = "sum"
    limits: Mapping[str, float] = field(default_factory=dict)
    """Least rating of an aspect in the unit of its ratings, or the largest where its weight is below 0; the most
    important first."""
    rated: set[str] = field(default_factory=set, compare=False)
    """Aspects of the rows that were looked at."""

    @property
    def best(self) -> float:
        """What no answer that is decided by limits reaches; the least is 0."""
        return 1.0 + (len(self.limits) if self.decide == "lexicographic" else 1)

    def value(self, row: Mapping[str, Any], among: Iterable[str]) -> float | None:
        """The worth of a rated answer over some of its aspects: `score`, or

            s     = what a rating lacks to its limit, as a share of its scale
            value = exp(-s) where s > 0, else 1 + the value of what comes next; last 1 / (1 + exp(-score))

        with one s for all limits together (`threshold`) or each in its turn (`lexicographic`). None where no aspect
        counts, or one with a limit was not rated.
        """
        among = set(among)
        self.rated.update(row["aspects"])
        summed = score(row, among, self.weights)
        if self.decide == "sum":
            return summed
        if not self.limits.keys() <= among:
            return None
        lacks = [self._lack(row, name, limit) for name, limit in self.limits.items()]
        value = 1 / (1 + math.exp(-(summed or 0.0)))
        for lack in reversed(lacks if self.decide == "lexicographic" else [sum(lacks)]):
            value = math.exp(-lack) if lack > 0 else 1 + value
        return value

    def check_names(self) -> None:
        """Raises DataError where a weight or a limit is of an aspect that no row is rated in: it would say nothing."""
        for what, named in (("weight", self.weights), ("limit", self.limits)):
            if self.rated and (missing := sorted(named.keys() - self.rated)):
                known = ", ".join(sorted(self.rated))
                raise DataError(f"{missing[0]} has a {what}, but no row rates it; the rows rate {known}")

    def _lack(self, row: Mapping[str, Any], name: str, limit: float) -> float:
        reached, wanted = (
            unit_rating(name, value, row.get("scales")) for value in (float(row["aspects"][name]), limit)
        )
        less_is_better = weights_of([name], self.weights)[name] < 0
        return max(0.0, reached - wanted if less_is_better else wanted - reached)
