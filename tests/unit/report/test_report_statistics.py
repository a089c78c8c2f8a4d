"""Statistics against hand-worked numbers and against statsmodels and scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from steersman.errors import DataError
from steersman.statistics import (
    calibration_bins,
    cohens_d,
    compare,
    expected_calibration_error,
    mean_interval,
    variance_change,
    wilson_interval,
)

RNG = np.random.default_rng(5)
BEFORE = RNG.normal(0.0, 2.0, 80).tolist()
AFTER = (0.3 * np.array(BEFORE) + RNG.normal(1.0, 0.6, 80)).tolist()


def test_equal_predictions_are_one_bin_whatever_their_order() -> None:
    outcomes = [1.0] * 8 + [0.0] * 2
    for order in (outcomes, outcomes[::-1]):
        bins = calibration_bins([0.9] * 10, order)
        assert [part.size for part in bins] == [10]
        assert expected_calibration_error(bins) == pytest.approx(0.1)
    mixed = calibration_bins([0.6, 0.7, 0.7, 0.7, 0.7, 0.8], [1.0] * 6, bins=3)
    assert [part.size for part in mixed] == [1, 5]


def test_mean_interval_by_hand() -> None:
    # 1, 2, 3, 4: mean 2.5, standard error sqrt(5/3)/2, t(0.975, 3) = 3.18245
    interval = mean_interval([1, 2, 3, 4])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert interval == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)


def test_bootstrap_agrees_with_t_and_is_deterministic() -> None:
    t, bootstrap = mean_interval(BEFORE), mean_interval(BEFORE, method="bootstrap")
    assert bootstrap == mean_interval(BEFORE, method="bootstrap")
    assert bootstrap.low == pytest.approx(t.low, abs=0.08)
    assert bootstrap.high == pytest.approx(t.high, abs=0.08)


def test_a_bootstrap_in_parts_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=37).tolist()
    whole = mean_interval(values, method="bootstrap")
    monkeypatch.setattr("steersman.statistics._VALUES_AT_ONCE", 37 * 101)
    assert mean_interval(values, method="bootstrap") == whole


def test_compare_is_paired() -> None:
    result = compare(BEFORE, AFTER)
    oracle = stats.ttest_rel(AFTER, BEFORE)
    assert result.p_value == pytest.approx(oracle.pvalue)
    assert result.difference[1:] == pytest.approx(tuple(oracle.confidence_interval(0.95)))
    assert result.wins + result.losses == result.pairs == 80
    # A shift that is the same for every prompt is certain, however much the prompts differ.
    shifted = compare([0.0, 5.0, 10.0], [1.0, 6.0, 11.0])
    assert shifted.difference == (1.0, 1.0, 1.0)
    assert shifted.p_value == 0.0
    assert compare([1.0, 2.0], [1.0, 2.0]).p_value == 1.0


def test_cohens_d_by_hand() -> None:
    # Means 2 and 4, variances 1 and 1: d = 2.
    assert cohens_d([1, 2, 3], [3, 4, 5]) == pytest.approx(2.0)
    assert cohens_d([1, 1], [1, 1]) == 0.0
    assert cohens_d([1, 1], [0, 0]) == -math.inf


def test_variance_change_sees_a_smaller_spread() -> None:
    change = variance_change(BEFORE, AFTER)
    assert change.ratio.estimate == pytest.approx(np.var(AFTER, ddof=1) / np.var(BEFORE, ddof=1))
    assert change.ratio.low < change.ratio.estimate < change.ratio.high < 1
    assert change.brown_forsythe_p == pytest.approx(stats.levene(BEFORE, AFTER, center="median").pvalue)
    assert change.brown_forsythe_p < 0.001
    assert change.pitman_morgan_p < 0.001
    same = variance_change(BEFORE, [-value for value in BEFORE])
    assert same.ratio.estimate == pytest.approx(1.0)
    assert same.pitman_morgan_p == 1.0


def test_pitman_morgan_uses_the_pairing_that_brown_forsythe_ignores() -> None:
    x = RNG.normal(0, 1, 40)
    y = 1.2 * x + RNG.normal(0, 0.05, 40)
    change = variance_change(x.tolist(), y.tolist())
    assert change.pitman_morgan_p < 0.001 < 0.05 < change.brown_forsythe_p


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_equals_statsmodels(case: tuple[int, int]) -> None:
    successes, count = case
    interval = wilson_interval(successes, count)
    low, high = proportion_confint(successes, count, method="wilson")
    assert interval == pytest.approx((successes / count, low, high), abs=1e-9)


def test_calibration_bins_and_error_by_hand() -> None:
    probabilities = [0.9, 0.6, 0.8, 0.7]
    outcomes = [1, 0, 1, 1]
    low, high = calibration_bins(probabilities, outcomes, bins=2)
    assert (low.predicted, low.observed.estimate, low.size) == pytest.approx((0.65, 0.5, 2))
    assert (high.predicted, high.observed.estimate, high.size) == pytest.approx((0.85, 1.0, 2))
    assert expected_calibration_error([low, high]) == pytest.approx((0.15 + 0.15) / 2)


def test_a_calibrated_model_has_a_small_error() -> None:
    p = RNG.uniform(0.5, 1, 5000)
    bins = calibration_bins(p.tolist(), (RNG.uniform(size=5000) < p).astype(float).tolist(), bins=10)
    assert expected_calibration_error(bins) < 0.03
    assert expected_calibration_error(calibration_bins(p.tolist(), [1.0] * 5000)) > 0.2


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: mean_interval([1.0]), "needs at least two values, got 1"),
        (lambda: mean_interval([1.0, math.nan, 2.0]), "value 1 is not finite"),
        (lambda: mean_interval([1.0, 2.0], method="magic"), "'magic'"),
        (lambda: compare([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3 values"),
        (lambda: variance_change([1.0, 1.0], [1.0, 2.0]), "some spread"),
        (lambda: wilson_interval(3, 2), "3 successes of 2"),
    ],
)
def test_bad_input_gets_one_clear_sentence(call, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=reason):
        call()


def test_answers_to_one_prompt_are_one_piece_of_evidence() -> None:
    # Prompts a, b, c gain 1, 3 and 5: mean 3, standard error 2 / sqrt(3), t(0.975, 2) = 4.30265.
    before, after = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0], [1.5, 0.5, 3.0, 5.0, 7.0, 7.0]
    result = compare(before, after, clusters=list("aabbcc"))
    half = 4.302653 * 2 / math.sqrt(3)
    assert result.difference == pytest.approx((3.0, 3.0 - half, 3.0 + half), abs=1e-5)
    assert (result.wins, result.losses, result.pairs) == (3, 0, 3)
    assert mean_interval(after, clusters=list("aabbcc")).estimate == pytest.approx((1 + 4 + 7) / 3)
    # Writing every answer down eight times says nothing new.
    assert compare(before * 8, after * 8, clusters=list("aabbcc") * 8).difference == pytest.approx(result.difference)
    with pytest.raises(DataError, match="at least two prompts"):
        compare(before, after, clusters=["a"] * 6)


def test_clustered_intervals_hold_their_level_where_independent_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 8).tolist()
    missed = naive = 0
    for _ in range(300):
        effect = np.repeat(rng.normal(0, 1, 40), 8)
        x, y = rng.normal(0, 1, 320), effect + rng.normal(0, 1, 320)
        for clustered in (True, False):
            low, high = compare(x.tolist(), y.tolist(), clusters=clusters if clustered else None).difference[1:]
            missed += clustered and not low <= 0 <= high
            naive += not clustered and not low <= 0 <= high
    assert missed / 300 < 0.09
    assert naive / 300 > 0.25


def test_a_change_of_variance_is_judged_over_prompts() -> None:
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(30), 6).tolist()
    centre = np.repeat(rng.normal(0, 1, 30), 6)
    x, y = centre + rng.normal(0, 1, 180), centre + rng.normal(0, 0.2, 180)
    single, clustered = (
        variance_change(x.tolist(), y.tolist()),
        variance_change(x.tolist(), y.tolist(), clusters=clusters),
    )
    assert clustered.ratio.estimate == single.ratio.estimate
    assert clustered.ratio.high - clustered.ratio.low > single.ratio.high - single.ratio.low
    assert clustered.brown_forsythe_p < 0.05
    assert clustered.pitman_morgan_p < 0.05
    same = variance_change(x.tolist(), (-x).tolist(), clusters=clusters)
    assert same.ratio == (1.0, 1.0, 1.0)
