"""Tests that may be looked at after every observation: e-processes for two proportions. Pure.

A canary is watched all the time, and each look is a chance to err. An e-process stays below 1/alpha for ever with
probability at least 1 - alpha when its null hypothesis is true (Ville's inequality), however often it is looked at and
whenever one stops.

    a block of n_a observations of the champion and n_b of the candidate arrives
    alternative (t_a, t_b), chosen before the block; (o_a, o_b): the point of the null that is nearest to it,
        argmin over the null of  n_a KL(t_a | o_a) + n_b KL(t_b | o_b)
    e-process *= prod over the observations y of either arm g of  Bernoulli(y; t_g) / Bernoulli(y; o_g)

The factor has expectation at most 1 under every member of a convex null (Turner, Ly and Gruenwald, "Generic E-variables
for exact sequential k-sample tests that allow for optional stopping", arXiv 2106.02693, Theorem 1; Turner and
Gruenwald, "Exact anytime-valid confidence intervals for contingency tables and beyond", arXiv 2203.09785, for nulls
other than equality). In short: with E_g(x) = x t_g/o_g + (1-x)(1-t_g)/(1-o_g) the expectation under (x_a, x_b) is
E_a^n_a E_b^n_b; its logarithm is concave, is 0 at (o_a, o_b), and rises from there in no direction into the null,
because the divergence is smallest there.

The functions work on numbers and, element by element, on numpy arrays of them (for simulations).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Number = Any
"""A float, or a numpy array of floats."""

_EDGE = 1e-6
"""Probabilities stay this far from 0 and 1."""
_HALVINGS = 40


@dataclass(frozen=True)
class Counts:
    """What one arm has shown so far; fractions are possible, because a metrics store extrapolates."""

    n: Number = 0.0
    """Observations."""
    bad: Number = 0.0
    """Those of them that speak against the arm."""


Pair = tuple[Number, Number]
"""Shares of bad observations: the champion's, the candidate's."""


@dataclass(frozen=True)
class Difference:
    """A null about the difference of the shares, candidate minus champion: on one side of `bound`.

    The alternative's difference begins at `start` and moves to what is seen, as if `start` had been seen on `weight`
    observations of either arm before; it stays between `low` and `high`, which lie on the other side of `bound`.
    """

    bound: float
    start: float
    low: float
    high: float
    weight: float = 1000.0
    prior: Pair = (1.0, 4.0)
    """Bad and good observations that stand for the base rate before there are any."""

    def alternative(self, champion: Counts, candidate: Counts) -> Pair:
        """The alternative for the next block, from all earlier observations."""
        total = champion.n + candidate.n
        balanced = 2 * champion.n * candidate.n / np.maximum(total, 1.0)
        seen = candidate.bad / np.maximum(candidate.n, _EDGE) - champion.bad / np.maximum(champion.n, _EDGE)
        wanted = np.clip((self.weight * self.start + balanced * seen) / (self.weight + balanced), self.low, self.high)
        base = (champion.bad + candidate.bad + self.prior[0] - wanted * candidate.n) / (total + sum(self.prior))
        base = np.clip(base, np.maximum(0.0, -wanted) + _EDGE, np.minimum(1.0, 1.0 - wanted) - _EDGE)
        return base, base + wanted

    def nearest(self, pair: Pair, sizes: Pair) -> Pair:
        """The point (x, x + bound) of the smallest divergence, by bisection of its slope, which rises in x."""
        low = np.zeros_like(np.asarray(pair[0], dtype=float)) + max(0.0, -self.bound)
        high = np.zeros_like(low) + min(1.0, 1.0 - self.bound)
        for _ in range(_HALVINGS):
            x = (low + high) / 2
            slope = sizes[0] * _slope(pair[0], x) + sizes[1] * _slope(pair[1], x + self.bound)
            low, high = np.where(slope < 0, x, low), np.where(slope < 0, high, x)
        x = (low + high) / 2
        return x, x + self.bound


@dataclass(frozen=True)
class Level:
    """The null that the candidate's share of bad observations is at most `bound`, whatever the champion's is."""

    bound: float
    share: float
    """The alternative."""

    def alternative(self, champion: Counts, candidate: Counts) -> Pair:
        return 0.5, self.share

    def nearest(self, pair: Pair, sizes: Pair) -> Pair:
        return pair[0], self.bound


Test = Difference | Level


def gain(test: Test, before: tuple[Counts, Counts], after: tuple[Counts, Counts]) -> Number:
    """What the observations between two looks add to the logarithm of the e-process.

    Args:
        test: the null and the alternative.
        before, after: counts of champion and candidate, at the last look and at this one. A judgement that a person
            changed moves a count back, and that takes its part of the evidence back.
    """
    n = [b.n - a.n for a, b in zip(before, after, strict=True)]
    bad = [b.bad - a.bad for a, b in zip(before, after, strict=True)]
    # Where judgements only changed, the arms weigh as they did so far.
    changed = (n[0] < 0) | (n[1] < 0) | (n[0] + n[1] <= 0)
    sizes = (np.where(changed, after[0].n, n[0]), np.where(changed, after[1].n, n[1]))
    alternative = test.alternative(*before)
    null = test.nearest(alternative, sizes)
    total: Number = 0.0
    for arm in (0, 1):
        wanted, refuted = _inside(alternative[arm]), _inside(null[arm])
        total = total + bad[arm] * np.log(wanted / refuted) + (n[arm] - bad[arm]) * np.log((1 - wanted) / (1 - refuted))
    return total


def restart(log_invested: Number, looks: int, gained: Number) -> Number:
    """The e-process of something that may begin to be wrong later, as a service that breaks after a good hour.

    An e-process that has lost much while all was well would need as much again. So only a part of the capital 1 is
    invested with each look, 1/(t (t+1)) with look t, and the rest waits: a mixture over the time of the change, and a
    martingale like its parts. `capital` adds what waits.

    Args:
        log_invested: logarithm of what is invested, after `looks` looks; anything where looks is 0.
        gained: what this look adds to an e-process that was there before it.
    """
    t = looks + 1
    fresh = -math.log(t * (t + 1))
    invested = np.logaddexp(log_invested, fresh) if looks else np.zeros_like(np.asarray(gained, dtype=float)) + fresh
    return invested + gained


def capital(log_invested: Number, looks: int) -> Number:
    """Logarithm of invested and waiting capital after `looks` looks."""
    return np.logaddexp(log_invested, -math.log(looks + 1)) if looks else 0.0 * log_invested


def threshold(alpha: float) -> float:
    """The logarithm that an e-process of a true null ever reaches with probability alpha at most."""
    return math.log(1.0 / alpha)


def _slope(target: Number, x: Number) -> Number:
    """Derivative of KL(target | x) by x."""
    x = _inside(x)
    return (x - target) / (x * (1 - x))


def _inside(share: Number) -> Number:
    return np.clip(share, _EDGE, 1 - _EDGE)
