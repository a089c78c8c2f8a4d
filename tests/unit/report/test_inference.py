"""Bootstrap, sign test, equivalence, win rates and strengths against scipy, statsmodels and numbers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.weightstats import ttost_paired

from steersman.errors import DataError
from steersman.inference import equivalence, paired_bootstrap, sign_test
from steersman.report.wins import Duel, bradley_terry, strengths, win_rate

RNG = np.random.default_rng(3)
BEFORE = RNG.normal(0, 1, 60)
AFTER = BEFORE + RNG.normal(0.1, 0.5, 60)


def test_the_paired_bootstrap_is_that_of_scipy() -> None:
    found = paired_bootstrap(BEFORE.tolist(), AFTER.tolist())
    oracle = stats.bootstrap(
        (AFTER - BEFORE,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found[1:] == pytest.approx((oracle.low, oracle.high), abs=0.01)
    # Drawing prompts, not answers: eight copies of every answer are no more evidence.
    copies = [number for number in range(60) for _ in range(8)]
    again = paired_bootstrap(np.repeat(BEFORE, 8).tolist(), np.repeat(AFTER, 8).tolist(), clusters=copies)
    assert again == pytest.approx(found)


@pytest.mark.parametrize("bound", [0.05, 0.2, 0.4])
def test_equivalence_is_that_of_statsmodels(bound: float) -> None:
    found = equivalence(BEFORE.tolist(), AFTER.tolist(), bound)
    p_value, lower, _ = ttost_paired(AFTER, BEFORE, -bound, bound)
    assert found.p_value == pytest.approx(p_value)
    assert found.p_drop == pytest.approx(lower[1])
    inner = stats.ttest_rel(AFTER, BEFORE).confidence_interval(0.9)
    assert found.equivalent == (-bound < inner.low and inner.high < bound)


def test_equivalence_of_what_does_not_vary() -> None:
    assert equivalence([1, 2, 3], [1, 2, 3], 0.01).equivalent
    assert not equivalence([1, 2, 3], [2, 3, 4], 0.5).equivalent
    assert equivalence([1, 2, 3], [2, 3, 4], 0.5).p_drop == 0.0
    with pytest.raises(DataError, match="does not matter"):
        equivalence([1, 2], [1, 2], 0.0)


def test_the_sign_test_is_mcnemars() -> None:
    before, after = [1] * 10 + [0] * 3 + [1] * 20, [0] * 10 + [1] * 3 + [1] * 20
    assert sign_test(before, after) == pytest.approx(mcnemar([[20, 10], [3, 0]], exact=True).pvalue)
    assert sign_test([1, 2], [1, 2]) == 1.0


def test_win_rates_count_ties_half_and_prompts_once() -> None:
    duels = [Duel("a", "x", "y", 1.0), Duel("a", "y", "x", 1.0), Duel("b", "x", "y", 0.5), Duel("c", "x", "y", 1.0)]
    found = win_rate(duels, "x", "y")
    assert (found.wins, found.ties, found.losses, found.prompts) == (2, 1, 1, 3)
    assert found.rate.estimate == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert win_rate(duels, "y", "x").rate.estimate == pytest.approx(1 - found.rate.estimate)
    with pytest.raises(DataError, match="never compared"):
        win_rate(duels, "x", "z")


def test_strengths_by_hand_and_as_a_logistic_regression() -> None:
    # Two versions: the logit of the win rate.
    assert bradley_terry(np.array([[[0.0, 3.0], [9.0, 0.0]]]))[0, 1] == pytest.approx(math.log(3))
    wins = np.array([[0, 6, 9, 4], [4, 0, 7, 3], [1, 3, 0, 2], [6, 7, 8, 0]], dtype=float)
    rows, won = [], []
    for i in range(4):
        for j in range(i + 1, 4):
            design = np.zeros(4)
            design[i], design[j] = 1.0, -1.0
            rows.append(design[1:])
            won.append((wins[i, j], wins[j, i]))
    oracle = sm.GLM(np.array(won), np.array(rows), family=sm.families.Binomial()).fit().params
    assert bradley_terry(wins[None])[0, 1:] == pytest.approx(oracle, abs=1e-6)


def test_strengths_have_intervals_over_prompts_and_stay_finite() -> None:
    duels = [Duel(number, "new", "old", 1.0) for number in range(30)]
    found = strengths(duels, ["old", "new"])
    assert found["old"] == (0.0, 0.0, 0.0)
    assert found["new"].estimate == pytest.approx(math.log(30.5 / 0.5))
    assert 0 < found["new"].low <= found["new"].high < math.inf
    even = strengths([Duel(n, "new", "old", float(n % 2)) for n in range(40)], ["old", "new"])["new"]
    assert even.low < 0 < even.high
    # The normal interval of a logit with 40 games, half of them won.
    assert even.high == pytest.approx(1.96 * 2 / math.sqrt(40), abs=0.1)
    with pytest.raises(DataError, match="lone is connected with old by no comparison"):
        strengths([*duels, Duel(1, "lone", "other", 1.0)], ["old", "new", "lone", "other"])
