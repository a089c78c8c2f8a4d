"""Tests of a difference: paired bootstrap, exact sign test, equivalence within a bound. Pure, as `statistics`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from steersman.errors import DataError
from steersman.statistics import CONFIDENCE, Interval, cluster_means, mean_interval


class Equivalence(NamedTuple):
    """Whether two models differ by less than a bound."""

    difference: Interval
    """After minus before, with the 95% interval."""
    bound: float
    p_value: float
    """Of two one-sided paired t tests (Schuirmann 1987): the larger of both."""
    p_drop: float
    """Of the one that asks for less than `bound` lost (non-inferiority)."""

    @property
    def equivalent(self) -> bool:
        """At 5%: the 90% interval lies within the bound."""
        return self.p_value <= 0.05


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
) -> Interval:  # fmt: skip
    """Difference of means with the percentile interval of a bootstrap that draws prompts with both models' answers."""
    difference = _differences(before, after, clusters, "paired_bootstrap")
    return mean_interval(difference.tolist(), method="bootstrap", confidence=confidence)


def equivalence(
    before: Sequence[float], after: Sequence[float], bound: float, *, clusters: Sequence[Hashable] | None = None
) -> Equivalence:
    """Two one-sided paired t tests that the means differ by less than `bound` (above 0)."""
    if not bound > 0 or not math.isfinite(bound):
        raise DataError(f"equivalence: the bound is {bound}; give the largest difference that does not matter")
    difference = _differences(before, after, clusters, "equivalence")
    interval = mean_interval(difference.tolist())
    if np.ptp(difference) <= 1e-12 * np.abs(difference).max():
        mean = float(difference[0])
        drop, rise = float(mean <= -bound), float(mean >= bound)
    else:
        drop = float(scipy.stats.ttest_1samp(difference, -bound, alternative="greater").pvalue)
        rise = float(scipy.stats.ttest_1samp(difference, bound, alternative="less").pvalue)
    return Equivalence(interval, bound, max(drop, rise), drop)


def sign_test(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided exact sign test over pairs that differ (of yes and no McNemar's exact test); 1 where none does."""
    _check_paired(before, after, "sign_test")
    ups = sum(y > x for x, y in zip(before, after, strict=True))
    changed = sum(y != x for x, y in zip(before, after, strict=True))
    return float(scipy.stats.binomtest(ups, changed, 0.5).pvalue) if changed else 1.0


def _differences(
    before: Sequence[float], after: Sequence[float], clusters: Sequence[Hashable] | None, name: str
) -> np.ndarray:
    _check_paired(before, after, name)
    return cluster_means(after, clusters, name) - cluster_means(before, clusters, name)


def _check_paired(before: Sequence[float], after: Sequence[float], name: str) -> None:
    if len(before) != len(after):
        counts = f"{len(before)} and {len(after)} values"
        raise DataError(f"{name}: {counts}; both need one value for each of the same items")
