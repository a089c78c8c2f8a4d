"""The canary's tests: by hand, against a search, through every outcome of a block; and the simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from benchmarks.canary import simulate
from steersman.canary import FALSE_ALARMS, MISSES, Arm, Evidence, decide, weigh
from steersman.config.manifest import Canary
from steersman.sequential import Counts, Difference, Level, capital, gain, restart, threshold

NOTHING = (Counts(), Counts())


def test_one_observation_of_each_arm_by_hand():
    """Base rate 1/5 from the prior, so the alternative is (0.2, 0.4); equality's nearest point is (0.3, 0.3)."""
    test = Difference(0.0, start=0.2, low=0.1, high=0.5, prior=(1.0, 4.0))
    one = (Counts(1, 0), Counts(1, 1))
    assert math.exp(gain(test, NOTHING, one)) == pytest.approx(0.8 / 0.7 * 0.4 / 0.3, rel=1e-9)
    assert gain(test, one, one) == 0.0, "the same counts again"


def test_the_alternative_moves_to_what_was_seen():
    """1,000 of either arm count as much as the start: half way from 0.08 to 0.16, base rate by the pooled share."""
    test = Difference(0.0, start=0.08, low=0.01, high=0.5, weight=1000, prior=(1.0, 4.0))
    base, other = test.alternative(Counts(1000, 200), Counts(1000, 360))
    assert other - base == pytest.approx(0.12)
    assert base == pytest.approx((560 + 1 - 0.12 * 1000) / 2005)


def test_a_level_by_hand():
    test = Level(0.02, 0.05)
    assert math.exp(gain(test, NOTHING, (Counts(), Counts(2, 1)))) == pytest.approx(0.05 / 0.02 * 0.95 / 0.98)
    assert gain(test, NOTHING, (Counts(50, 50), Counts())) == 0.0, "the champion's observations say nothing"


@given(st.floats(0.02, 0.98), st.floats(0.02, 0.98), st.integers(1, 50), st.integers(1, 50), st.floats(-0.5, 0.5))
@settings(max_examples=60, deadline=None)
def test_the_nearest_point_of_the_null_against_a_search(ta, tb, na, nb, bound):
    x, y = Difference(bound, 0.0, -1.0, 1.0).nearest((ta, tb), (na, nb))
    assert y - x == pytest.approx(bound)

    def divergence(x: float) -> float:
        def kl(t: float, o: float) -> float:
            return stats.entropy([t, 1 - t], [o, 1 - o])

        return na * kl(ta, x) + nb * kl(tb, x + bound)

    edges = (max(0.0, -bound) + 1e-6, min(1.0, 1.0 - bound) - 1e-6)
    found = optimize.minimize_scalar(divergence, bounds=edges, method="bounded", options={"xatol": 1e-10})
    assert divergence(float(np.clip(x, *edges))) <= found.fun + 1e-7


@pytest.mark.parametrize(
    ("test", "null"),
    [
        (Difference(0.0, start=0.1, low=0.05, high=0.5), lambda a, b: b <= a),
        (Difference(0.05, start=0.0, low=-0.5, high=0.02), lambda a, b: b >= a + 0.05),
        (Difference(-0.1, start=0.1, low=0.0, high=0.5), lambda a, b: b <= a - 0.1),
        (Level(0.3, 0.6), lambda a, b: b <= 0.3),
    ],
)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 4), (3, 3), (0, 3)])
def test_no_member_of_the_null_expects_more_than_one(test, null, sizes):
    """Every outcome of a block, for a grid of true shares, after some history that shaped the alternative."""
    before = (Counts(20, 5), Counts(10, 4))
    outcomes = list(itertools.product(range(sizes[0] + 1), range(sizes[1] + 1)))
    factors = [
        math.exp(gain(test, before, (Counts(20 + sizes[0], 5 + bad[0]), Counts(10 + sizes[1], 4 + bad[1]))))
        for bad in outcomes
    ]
    shares = np.linspace(0, 1, 21)
    for a, b in itertools.product(shares, shares):
        if null(a, b):
            chances = [
                math.prod(
                    math.comb(n, k) * p**k * (1 - p) ** (n - k) for k, n, p in zip(bad, sizes, (a, b), strict=True)
                )
                for bad in outcomes
            ]
            assert np.dot(chances, factors) <= 1 + 1e-4, (a, b)


def test_a_judgement_that_was_changed_takes_its_evidence_back():
    limits = Canary()
    clean = weigh(Evidence(), Arm(judged=400, bad=80), Arm(judged=400, bad=100), limits)
    worse = weigh(clean, Arm(judged=400, bad=80), Arm(judged=400, bad=120), limits)
    back = weigh(worse, Arm(judged=400, bad=80), Arm(judged=400, bad=100), limits)
    assert worse.harm > clean.harm
    assert back.harm == pytest.approx(clean.harm, abs=0.7)


def test_capital_that_waits_is_there_when_something_breaks_later():
    """By hand: 1/2 is invested at the first look, which halves it; 1/6 joins at the second, which triples both."""
    first = restart(0.0, 0, math.log(0.5))
    second = restart(first, 1, math.log(3.0))
    assert math.exp(second) == pytest.approx((0.25 + 1 / 6) * 3)
    assert math.exp(capital(second, 2)) == pytest.approx((0.25 + 1 / 6) * 3 + 1 / 3)
    assert capital(0.0, 0) == 0.0


def test_a_service_that_breaks_after_a_good_day_is_found():
    evidence, limits = Evidence(), Canary()
    for look in range(1, 200):
        good = Arm(requests=500 * look, errors=look, timed=500 * look, slow=50 * look)
        evidence = weigh(evidence, good, good, limits)
    assert decide(evidence, limits).against is None
    candidate = good.model_copy(update={"requests": good.requests + 60, "errors": good.errors + 30})
    champion = good.model_copy(update={"requests": good.requests + 540})
    assert "requests failed" in str(decide(weigh(evidence, champion, candidate, limits), limits).against)


def test_the_stated_rates_are_the_sum_of_the_parts():
    assert sum(FALSE_ALARMS.values()) == pytest.approx(0.05)
    assert MISSES == 0.05
    assert threshold(0.05) == pytest.approx(math.log(20))


def test_without_people_nothing_is_said():
    verdict = decide(weigh(Evidence(), Arm(requests=900), Arm(requests=900), Canary()), Canary())
    assert (verdict.against, verdict.harmless) == (None, False)
    anything = Canary(max_thumbs_down_increase=1.0)
    assert decide(Evidence(), anything).harmless, "who accepts any harm needs no judgements"


def test_a_champion_that_fails_as_often_is_no_reason():
    """A database that is down fails both variants."""
    both = Arm(requests=2000, errors=200)
    assert decide(weigh(Evidence(), both, both, Canary()), Canary()).against is None
    found = decide(weigh(Evidence(), Arm(requests=2000, errors=10), both, Canary()), Canary())
    assert "10.0% of the requests failed" in str(found.against)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_equal_candidates_are_seldom_taken_back_and_worse_ones_seldom_promoted(share):
    """The benchmark in small (its 2,000 canaries of 10,000 judgements: `make bench-canary`)."""
    equal = simulate(0.2, 0.2, canaries=300, judgements=3000, every=20, share=share, seed=11)
    worse = simulate(0.2, 0.25, canaries=300, judgements=3000, every=20, share=share, seed=12)
    # 5% and four standard errors of 300 draws.
    assert equal.rolled_back() <= 0.10
    assert worse.promoted() <= 0.10


def test_harm_is_found_in_time():
    five = simulate(0.2, 0.25, canaries=300, judgements=2000, every=20, seed=13)
    ten = simulate(0.2, 0.30, canaries=300, judgements=600, every=20, seed=14)
    assert five.judgements() < 2000
    assert ten.judgements() <= 520
