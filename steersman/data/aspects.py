"""What ratings of several aspects say about an answer as a whole: one rule for releases, honeypots and reward models.

    score = 4 sum_a w_a * u_a / sum_a |w_a|,    u_a = (rating - low) / (high - low) in [0, 1] by the aspect's scale

A weight's sign is the aspect's direction: -1 says that less is better. Without weights of one's own every aspect counts
as 1, but length and complexity, which are no virtues, count as 0 and harm as -1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steersman.errors import DataError

Scales = Mapping[str, Sequence[float]]

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
