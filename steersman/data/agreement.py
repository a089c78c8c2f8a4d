"""How far labelers agree: the statistics, from counts of votes.

The input is a mapping from a pattern of votes on one unit to the number of units with that pattern, so the cost does
not depend on the number of judgements. The kept packages walk unit by unit (seconds for a million votes) and would
double the gateway's image; the tests hold these closed forms to `krippendorff`, `statsmodels`, `scikit-learn` and
`scipy`, and to the published figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Level = Literal["nominal", "ordinal", "interval", "ratio"]
#: Votes of one unit as sorted (value, count) pairs.
Pattern = tuple[tuple[float, int], ...]
Patterns = Mapping[Pattern, int]
#: The patterns of an item's units -> items with these.
Items = Mapping[tuple[Pattern, ...], int]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]


def patterns_of(ratings: Iterable[Sequence[float | None]]) -> dict[Pattern, int]:
    """Counts the patterns of a table of ratings, one row a unit, None or NaN where a rater gave none."""
    found: Counter[Pattern] = Counter()
    for row in ratings:
        votes = Counter(value for value in row if value is not None and not math.isnan(value))
        if votes:
            found[tuple(sorted(votes.items()))] += 1
    return dict(found)


def krippendorff_alpha(patterns: Patterns, level: Level) -> float | None:
    """Krippendorff's alpha; units with one vote do not count.

    Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011.
    None where it is not defined: no unit with two votes, or all votes equal.
    """
    paired = {pattern: n for pattern, n in patterns.items() if n > 0 and sum(count for _, count in pattern) > 1}
    domain = sorted({value for pattern in paired for value, _ in pattern})
    if len(domain) < 2:
        return None
    counts, units = _table(paired, domain)
    # Section B of the paper: every ordered pair of votes on a unit of m votes weighs 1 / (m - 1).
    weights = units / (counts.sum(1) - 1)
    observed = np.einsum("p,pc,pk->ck", weights, counts, counts) - np.diag(weights @ counts)
    totals = observed.sum(0)
    expected = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    distances = _distances(np.array(domain), totals, level)
    return float(1 - (observed * distances).sum() / (expected * distances).sum())


def _distances(domain: Floats, totals: Floats, level: Level) -> Floats:
    """[values, values]: squared difference of two values at a level of measurement (section C of the paper)."""
    if level == "nominal":
        return 1.0 - np.eye(len(domain))
    if level == "ordinal":  # how many votes lie between the two values, half of their own included
        ranks = np.cumsum(totals) - totals / 2
        return np.subtract.outer(ranks, ranks) ** 2
    apart = np.subtract.outer(domain, domain)
    if level == "ratio":
        sums = np.add.outer(domain, domain)
        apart = np.divide(apart, sums, out=np.zeros_like(apart), where=sums != 0)
    return apart**2


def fleiss_kappa(patterns: Patterns) -> tuple[float | None, int, int]:
    """Fleiss' kappa over the units with the most usual number of votes.

    Source: Fleiss, "Measuring nominal scale agreement among many raters", 1971; it needs the same number of raters
    for every unit. Returns kappa (None where it is not defined), the units used, and the votes of each.
    """
    sizes: Counter[int] = Counter()
    for pattern, n in patterns.items():
        sizes[sum(count for _, count in pattern)] += n
    votes = max(
        (size for size in sizes if size > 1 and sizes[size] > 0), key=lambda size: (sizes[size], size), default=0
    )
    complete = {p: n for p, n in patterns.items() if n > 0 and votes and sum(count for _, count in p) == votes}
    domain = sorted({value for pattern in complete for value, _ in pattern})
    units = sum(complete.values())
    if len(domain) < 2:
        return None, units, votes
    counts, weights = _table(complete, domain)
    observed = weights @ ((counts**2).sum(1) - votes) / (units * votes * (votes - 1))
    expected = (((weights @ counts) / (units * votes)) ** 2).sum()
    return float((observed - expected) / (1 - expected)), units, votes


def cohen_kappa(confusion: Mapping[tuple[float, float], int], *, weighted: bool = False) -> float | None:
    """Cohen's kappa of two raters from (first's value, second's value) -> count; linear weights when `weighted`.

    Source: Cohen, "A coefficient of agreement for nominal scales", 1960. None where it is not defined.
    """
    domain = sorted({value for pair, n in confusion.items() if n > 0 for value in pair})
    if len(domain) < 2:
        return None
    observed = np.array([[confusion.get((first, second), 0) for second in domain] for first in domain])
    places = np.arange(len(domain))
    distances = np.abs(np.subtract.outer(places, places)) if weighted else 1 - np.eye(len(domain))
    expected = np.outer(observed.sum(1), observed.sum(0)) / observed.sum()
    chance = (distances * expected).sum()
    return float(1 - (distances * observed).sum() / chance) if chance else None


def raw_agreement(patterns: Patterns) -> tuple[int, int]:
    """Pairs of votes on the same unit, and how many of them are equal."""
    pairs = agreeing = 0
    for pattern, n in patterns.items():
        size = sum(count for _, count in pattern)
        pairs += n * (size * (size - 1) // 2)
        agreeing += n * sum(count * (count - 1) // 2 for _, count in pattern)
    return pairs, agreeing


def units_of(items: Items) -> dict[Pattern, int]:
    """The patterns of all units of some items."""
    found: Counter[Pattern] = Counter()
    for units, n in items.items():
        for pattern in units:
            found[pattern] += n
    return dict(found)


def bootstrap_intervals(
    items: Items,
    statistics: Mapping[str, Callable[[Patterns], float | None]],
    *,
    samples: int = 400,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of statistics, by drawing the items anew; the same items give the same intervals.

    A drawn item brings all of its units: the pairs of a ranking's answers say much the same, so that drawing each by
    itself would make a few items look like many. Source: Efron and Tibshirani, "An Introduction to the Bootstrap",
    1993, section 13.3; for alpha, Hayes and Krippendorff, "Answering the Call for a Standard Reliability Measure for
    Coding Data", 2007; for items, Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8. A
    draw in which every vote is equal counts as 1, because nobody disagrees in it. Empty when no unit has two votes.
    """
    paired: Counter[tuple[Pattern, ...]] = Counter()
    for units, n in items.items():
        if kept := tuple(pattern for pattern in units if sum(count for _, count in pattern) > 1):
            paired[kept] += max(n, 0)
    if not paired.total():
        return {}
    patterns = sorted({pattern for units in paired for pattern in units})
    place = {pattern: at for at, pattern in enumerate(patterns)}
    held = np.zeros((len(paired), len(patterns)), np.int64)  # units of a pattern in an item
    for row, units in enumerate(paired):
        np.add.at(held[row], [place[pattern] for pattern in units], 1)
    weights = np.array(list(paired.values()), np.float64)
    draw = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(samples):
        counts = draw.multinomial(int(weights.sum()), weights / weights.sum()) @ held
        sample = {pattern: int(n) for pattern, n in zip(patterns, counts, strict=True) if n}
        agreed = len({vote for pattern in sample for vote, _ in pattern}) == 1
        for name, statistic in statistics.items():
            value = 1.0 if agreed else statistic(sample)
            if value is not None:
                found[name].append(value)
    return {name: _percentiles(values) for name, values in found.items() if values}


def share_interval(part: int, whole: int, *, samples: int = 4000, seed: int = 0) -> tuple[float, float] | None:
    """95% bootstrap percentile interval of a share; None of nothing."""
    if not whole:
        return None
    return _percentiles(np.random.default_rng(seed).binomial(whole, part / whole, samples) / whole)


def _percentiles(values: Sequence[float] | Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def order_bias(decided: int, decided_first: int) -> tuple[float | None, float | None]:
    """Share of comparisons won by the answer shown first, and the two-sided binomial p-value against one half."""
    if not decided:
        return None, None
    tail = min(decided_first, decided - decided_first)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, decided + 1)))])
    fewer = np.arange(tail + 1)
    chances = log_factorials[decided] - log_factorials[fewer] - log_factorials[decided - fewer] - decided * math.log(2)
    return decided_first / decided, min(1.0, 2 * float(np.exp(chances).sum()))


def _table(patterns: Patterns, domain: Sequence[float]) -> tuple[Counts, Counts]:
    """int64 [patterns, values]: votes for each value; int64 [patterns]: units of each pattern."""
    rows = [[dict(pattern).get(value, 0) for value in domain] for pattern in patterns]
    return np.array(rows, np.int64), np.array(list(patterns.values()), np.int64)


class Thresholds(BaseModel):
    """What the judgements of a project must reach before its data may be released; unset means no demand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_alpha: float | None = Field(default=None, le=1)
    """Krippendorff's alpha of every question."""
    min_fleiss: float | None = Field(default=None, le=1)
    """Fleiss' kappa of every question."""
    min_raw_agreement: float | None = Field(default=None, ge=0, le=1)
    """Share of agreeing pairs of votes of every question."""
    min_honeypot_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Share of honeypots judged right, over all labelers."""
    max_order_bias: float | None = Field(default=None, ge=0, le=0.5)
    """Distance from one half of the share that the answer shown first wins."""
    min_judgements: int | None = Field(default=None, ge=0)
    """Judgements in the project, skipped ones left out."""
    min_common_items: int = Field(default=5, ge=1)
    """Items with two votes that a demand on agreement needs; below it the figure is unknown. The least that shows
    anything: ask for more where much depends on it."""
    min_labelers: int = Field(default=2, ge=2)
    """Labelers with items in common that a demand on agreement needs."""
    min_honeypots: int = Field(default=5, ge=1)
    """Judged honeypots that a demand on their accuracy needs."""


class QuestionAgreement(BaseModel):
    """Agreement on one question."""

    model_config = ConfigDict(frozen=True)

    question: str
    units: int
    """Units with at least two votes."""
    pairs: int
    raw: float | None
    """Share of agreeing pairs of votes."""
    alpha: float | None
    level: Level
    fleiss: float | None
    fleiss_units: int
    fleiss_votes: int
    items: int | None = None
    """Items with at least two votes: of a ranking's item come several units."""
    labelers: int | None = None
    """Labelers who judged an item that another one judged."""
    intervals: dict[str, tuple[float, float]] = {}
    """95% bootstrap intervals of raw, alpha and fleiss, over items."""


class LabelerFigures(BaseModel):
    """One labeler's figures."""

    model_config = ConfigDict(frozen=True)

    labeler: str
    judgements: int
    skipped: int
    unsafe: int
    agreement: float | None
    """Share of this labeler's votes that equal another labeler's vote on the same unit."""
    honeypots: int
    honeypot_accuracy: float | None
    first_share: float | None
    """Share of comparisons won by the answer shown first."""
    first_p_value: float | None
    seconds_per_item: float | None


class PairFigures(BaseModel):
    """Two labelers on one question."""

    model_config = ConfigDict(frozen=True)

    question: str
    first: str
    second: str
    units: int
    raw: float
    kappa: float | None


class DayFigures(BaseModel):
    """Agreement on one question on one day."""

    model_config = ConfigDict(frozen=True)

    question: str
    day: str
    pairs: int
    raw: float


class AgreementReport(BaseModel):
    """Everything that is known about the judges of one project."""

    model_config = ConfigDict(frozen=True)

    project: str
    judgements: int
    honeypots: int
    honeypot_accuracy: float | None
    first_share: float | None
    first_p_value: float | None
    intervals: dict[str, tuple[float, float]] = {}
    """95% bootstrap intervals of honeypot_accuracy and first_share."""
    questions: list[QuestionAgreement]
    labelers: list[LabelerFigures]
    pairs: list[PairFigures]
    days: list[DayFigures]

    def failures(self, thresholds: Thresholds) -> list[str]:
        """What misses its threshold, each with both numbers; empty when the data may be released."""
        every = (("alpha", "alpha", thresholds.min_alpha), ("Fleiss' kappa", "fleiss", thresholds.min_fleiss),
                   ("raw agreement", "raw", thresholds.min_raw_agreement))  # fmt: skip
        demands = tuple(demand for demand in every if demand[2] is not None)
        found = []
        for question in self.questions if demands else ():
            found += _unknown(question, thresholds)
            for name, field, least in demands:
                found += _missed(question, name, field, least or 0.0)
        if demands and not self.questions:
            found.append("no item has two votes, so agreement is unknown")
        accuracy, least = self.honeypot_accuracy, thresholds.min_honeypot_accuracy
        if least is not None and (accuracy is None or accuracy < least):
            found.append(f"honeypot accuracy is {_number(accuracy)}, at least {least:g} is asked")
        elif least is not None and self.honeypots < thresholds.min_honeypots:
            needed = f"at least {thresholds.min_honeypots} are needed to know their accuracy"
            found.append(f"{self.honeypots} honeypots were judged, {needed}")
        elif least is not None and self._interval("honeypot_accuracy")[0] < least:
            found.append(
                _of_all("honeypot accuracy", accuracy, self._interval("honeypot_accuracy"), f"at least {least:g}")
            )
        most = thresholds.max_order_bias
        if most is not None and self.first_share is not None:
            interval, asked = self._interval("first_share"), f"{0.5 - most:g} to {0.5 + most:g}"
            if abs(self.first_share - 0.5) > most:
                found.append(f"the answer shown first wins {self.first_share:.3f} of the comparisons, {asked} is asked")
            elif max(abs(bound - 0.5) for bound in interval) > most:
                found.append(
                    _of_all(
                        "the share of comparisons that the answer shown first wins", self.first_share, interval, asked
                    )
                )
        elif most is not None and self.first_share is None:
            found.append("nothing was decided between two answers, so the bias of their order is unknown")
        if thresholds.min_judgements is not None and self.judgements < thresholds.min_judgements:
            found.append(f"{self.judgements} judgements, at least {thresholds.min_judgements} are asked")
        return found

    def _interval(self, field: str) -> tuple[float, float]:
        value = getattr(self, field)
        return self.intervals.get(field, (value, value))


def _of_all(name: str, value: float | None, interval: tuple[float, float], asked: str) -> str:
    """Why a figure that is good enough is not known well enough."""
    low, high = interval
    return f"{name} is {_number(value)} with a 95% interval from {low:.3f} to {high:.3f}, {asked} is asked of all of it"


def _unknown(question: QuestionAgreement, thresholds: Thresholds) -> list[str]:
    """Why the agreement on a question cannot be known yet."""
    found = []
    items = question.units if question.items is None else question.items
    if items < thresholds.min_common_items:
        needed = f"at least {thresholds.min_common_items} are needed to know the agreement"
        found.append(f"{question.question}: {items} items have two votes, {needed}")
    if question.labelers is not None and question.labelers < thresholds.min_labelers:
        needed = f"at least {thresholds.min_labelers} are asked"
        found.append(f"{question.question}: {question.labelers} labelers have items in common, {needed}")
    return found


def _missed(question: QuestionAgreement, name: str, field: str, least: float) -> list[str]:
    value = getattr(question, field)
    if value is None and question.raw == 1.0:
        return []  # with every vote equal the coefficients are not defined, but nobody disagreed
    if value is None or value < least:
        return [f"{question.question}: {name} is {_number(value)}, at least {least:g} is asked"]
    interval = question.intervals.get(field, (value, value))
    if interval[0] < least:
        return [_of_all(f"{question.question}: {name}", value, interval, f"at least {least:g}")]
    return []


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
