"""Statistics of an evaluation: intervals, paired differences, effect size, change of variance, calibration.

All functions take plain sequences of finite numbers and are deterministic (the bootstrap has a fixed seed).

Several answers to one prompt are no independent evidence: what a model gains or loses on a prompt, it gains or loses
with all of its samples. `clusters` names the prompt of every value; intervals and tests then count prompts, not
answers: the value of a prompt is the mean of its answers, and Student's t runs over prompts (Donner and Klar 2000,
chapter 6; the cluster-robust interval where every prompt has as many answers). Without clusters every value is a prompt
of its own.

`scipy.stats` takes a second to load and so is loaded by the first test that is asked for; intervals do without.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from scipy import special

from steersman.errors import DataError

CONFIDENCE = 0.95
BOOTSTRAP_DRAWS = 4000
_VALUES_AT_ONCE = 4_000_000
"""Drawn values that are held at a time."""


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two models on the same prompts: after minus before."""

    difference: Interval
    p_value: float
    """Two-sided paired t test."""
    effect_size: float
    """Cohen's d with the pooled standard deviation of both models."""
    wins: int
    """Prompts on which the later model scores higher."""
    losses: int
    pairs: int
    """Prompts."""


class VarianceChange(NamedTuple):
    """How the spread of scores changed: after relative to before."""

    ratio: Interval
    """Variance after / variance before, with a paired bootstrap interval."""
    brown_forsythe_p: float
    """Levene's test around the median (Brown and Forsythe 1974); it takes both models' answers as independent. With
    several answers to a prompt: paired, over prompts."""
    pitman_morgan_p: float
    """Pitman-Morgan test for paired samples, which these are."""


class CalibrationBin(NamedTuple):
    """Pairs with a similar predicted probability."""

    predicted: float
    observed: Interval
    size: int


def mean_interval(
    values: Sequence[float],
    *,
    method: str = "t",
    confidence: float = CONFIDENCE,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean with its interval: `t` (Student) or `bootstrap` (percentile), both over clusters."""
    x = cluster_means(values, clusters, "mean_interval")
    mean = float(x.mean())
    if method == "bootstrap":
        rng, at_once = np.random.default_rng(0), max(1, _VALUES_AT_ONCE // len(x))
        sizes = [min(at_once, BOOTSTRAP_DRAWS - done) for done in range(0, BOOTSTRAP_DRAWS, at_once)]
        means = np.concatenate([x[rng.integers(0, len(x), (size, len(x)))].mean(axis=1) for size in sizes])
        return Interval(mean, *_percentiles(means, confidence))
    if method != "t":
        raise DataError(f"mean_interval: method is {method!r}; use 't' or 'bootstrap'.")
    half = float(special.stdtrit(len(x) - 1, (1 + confidence) / 2) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)


def compare(
    before: Sequence[float],
    after: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    clusters: Sequence[Hashable] | None = None,
) -> Comparison:
    """Paired comparison of two models; row i of both is the same prompt, and with `clusters` the same sample of it."""
    _pair(before, after, "compare")
    x, y = cluster_means(before, clusters, "compare"), cluster_means(after, clusters, "compare")
    difference = y - x
    size = float(np.abs(difference).max())
    # The t statistic of a constant difference is 0/0 or x/0.
    constant = np.ptp(difference) <= 1e-12 * size
    p_value = float(size == 0) if constant else float(scipy.stats.ttest_rel(y, x).pvalue)
    return Comparison(
        difference=mean_interval(difference.tolist(), confidence=confidence),
        p_value=p_value,
        effect_size=cohens_d(before, after),
        wins=int((difference > 0).sum()),
        losses=int((difference < 0).sum()),
        pairs=len(difference),
    )


def cohens_d(before: Sequence[float], after: Sequence[float]) -> float:
    """Difference of means in units of the pooled standard deviation (Cohen 1988, d_s); 0 / 0 is 0."""
    x, y = _array(before, "cohens_d"), _array(after, "cohens_d")
    pooled = math.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / (len(x) + len(y) - 2))
    difference = float(y.mean() - x.mean())
    if pooled == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / pooled


def variance_change(
    before: Sequence[float],
    after: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    clusters: Sequence[Hashable] | None = None,
) -> VarianceChange:
    """Ratio of the variances of single answers with its interval, and whether the change is significant."""
    x, y = _pair(before, after, "variance_change")
    if x.var() == 0 or y.var() == 0:
        raise DataError("variance_change: all values of one model are equal; a ratio of variances needs some spread.")
    index = _cluster_index(clusters, len(x), "variance_change")
    spread, later = _bootstrap_variances(np.stack([x, y]), index)
    ratios = later[spread > 0] / spread[spread > 0]
    total, gap = y + x, y - x
    degenerate = total.std() == 0 or gap.std() == 0
    if index.max() + 1 == len(x):
        brown_forsythe = float(scipy.stats.levene(x, y, center="median").pvalue)
        pitman_morgan = 1.0 if degenerate else float(scipy.stats.pearsonr(total, gap).pvalue)
    else:
        # The same questions as means over prompts: do distances from the median differ, do sum and gap covary?
        distances = np.abs(y - np.median(y)) - np.abs(x - np.median(x))
        brown_forsythe = _p_of_zero_mean(distances, index)
        pitman_morgan = 1.0 if degenerate else _p_of_zero_mean((total - total.mean()) * (gap - gap.mean()), index)
    return VarianceChange(
        ratio=Interval(float(y.var(ddof=1) / x.var(ddof=1)), *_percentiles(ratios, confidence)),
        brown_forsythe_p=brown_forsythe,
        pitman_morgan_p=pitman_morgan,
    )


def wilson_interval(successes: float, count: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Share with Wilson's score interval (Wilson 1927); `successes` may be fractional where ties count half."""
    if count < 1 or not 0 <= successes <= count:
        raise DataError(f"wilson_interval: {successes} successes of {count}; give 0 <= successes <= count, count >= 1.")
    z = float(special.ndtri((1 + confidence) / 2))
    share = successes / count
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def calibration_bins(
    probabilities: Sequence[float], outcomes: Sequence[float], *, bins: int = 5
) -> list[CalibrationBin]:
    """Bins of about equally many predictions: mean predicted probability against the observed share of `outcomes`.

    Equal predictions stay in one bin: their order says nothing, and would decide what each half of them observes.
    """
    predicted, observed = _pair(probabilities, outcomes, "calibration_bins")
    order = np.argsort(predicted, kind="stable")
    return [
        CalibrationBin(
            float(predicted[part].mean()), wilson_interval(float(observed[part].sum()), len(part)), len(part)
        )
        for part in np.split(order, _edges_between_ties(predicted[order], min(bins, len(order))))
    ]


def _edges_between_ties(ordered: np.ndarray, bins: int) -> list[int]:
    """Where to cut ascending values into about equal bins without parting equal ones."""
    wanted = [len(part) for part in np.array_split(ordered, bins)]
    cuts = {int(np.searchsorted(ordered, ordered[cut], side="left")) for cut in np.cumsum(wanted)[:-1]}
    return sorted(cuts - {0})


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Mean distance of predicted and observed share, weighted by the bins' counts (Naeini et al. 2015)."""
    total = sum(part.size for part in bins)
    return sum(part.size * abs(part.predicted - part.observed.estimate) for part in bins) / total


def cluster_means(values: Sequence[float], clusters: Sequence[Hashable] | None, name: str) -> np.ndarray:
    """Mean of every cluster, in the order in which they first appear; the values themselves without clusters.

    Raises:
        DataError: fewer than two clusters, from which nothing can be said about others.
    """
    x = _array(values, name)
    index = _cluster_index(clusters, len(x), name)
    return np.bincount(index, weights=x) / np.bincount(index)


def _cluster_index(clusters: Sequence[Hashable] | None, count: int, name: str) -> np.ndarray:
    """int64 [count], the number of every value's cluster."""
    if clusters is None:
        return np.arange(count)
    if len(clusters) != count:
        raise DataError(f"{name}: {count} values and {len(clusters)} clusters; give the cluster of every value.")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    if len(numbers) < 2:
        raise DataError(f"{name} needs answers to at least two prompts; several answers to one say nothing of others.")
    return index


def _bootstrap_variances(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Variances [M, draws] of values [M, N] whose clusters are drawn anew."""
    clusters = int(index.max()) + 1
    draws = np.random.default_rng(0).integers(0, clusters, (BOOTSTRAP_DRAWS, clusters))
    centred = values - values.mean(axis=1, keepdims=True)

    def drawn(parts: np.ndarray) -> np.ndarray:
        return np.bincount(index, weights=parts, minlength=clusters)[draws].sum(axis=1)

    size = drawn(np.ones(len(index)))
    return np.stack([(drawn(row**2) - drawn(row) ** 2 / size) / (size - 1) for row in centred])


def _p_of_zero_mean(values: np.ndarray, index: np.ndarray) -> float:
    """Two-sided t test over clusters that the mean is 0."""
    means = np.bincount(index, weights=values) / np.bincount(index)
    return float(np.abs(means).max() == 0) if np.ptp(means) == 0 else float(scipy.stats.ttest_1samp(means, 0.0).pvalue)


def _array(values: Sequence[float], name: str) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) < 2:
        raise DataError(f"{name} needs at least two values, got {x.size}.")
    if not np.isfinite(x).all():
        raise DataError(f"{name}: value {int(np.argmin(np.isfinite(x)))} is not finite; leave missing scores out.")
    return x


def _pair(before: Sequence[float], after: Sequence[float], name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = _array(before, name), _array(after, name)
    if len(x) != len(y):
        raise DataError(f"{name}: {len(x)} and {len(y)} values; both need one value for each of the same items.")
    return x, y


def _percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
