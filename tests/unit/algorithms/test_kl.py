"""KL estimators and controllers on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from ppo_reference import adaptive_kl

from steersman.errors import InvalidArgumentError
from training.mathematics.kl import AdaptiveKL, FixedKL, estimate_kl


def test_estimators_by_hand() -> None:
    # pi = 0.5, pi_ref = 0.25: log ratio = ln 2.  k1 = ln 2, k2 = (ln 2)^2 / 2, k3 = 0.25/0.5 - 1 + ln 2 = ln 2 - 0.5
    logprobs, ref = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert estimate_kl(logprobs, ref, "k1").item() == pytest.approx(0.6931472, abs=1e-6)
    assert estimate_kl(logprobs, ref, "k2").item() == pytest.approx(0.2402265, abs=1e-6)
    assert estimate_kl(logprobs, ref, "k3").item() == pytest.approx(0.1931472, abs=1e-6)


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    """Exact expectation over a small distribution: sum_x p(x) k(x) = KL(p || q)."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    kl = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * estimate_kl(p.log(), q.log(), estimator)).sum(), kl)
    assert bool((estimate_kl(p.log(), q.log(), "k3") >= 0).all())


def test_k3_keeps_its_digits_near_zero() -> None:
    # d = 1e-4: k3 = d^2 / 2 + ... = 5e-9; exp(d) - 1 - d in fp32 would give 0 or 1e-7
    value = estimate_kl(torch.tensor([-1e-4]), torch.tensor([0.0]), "k3").item()
    assert value == pytest.approx(5e-9, rel=2e-3)


def test_adaptive_controller_by_hand() -> None:
    # current 9, target 6: error = 0.5, limited to 0.2; 0.05 * (1 + 0.2 * 64 / 10000) = 0.050064
    assert AdaptiveKL(0.05).update(9.0, 64).value == pytest.approx(0.050064)
    # current 5.4: error = -0.1; 0.05 * (1 - 0.1 * 64 / 10000) = 0.049968
    assert AdaptiveKL(0.05).update(5.4, 64).value == pytest.approx(0.049968)
    assert AdaptiveKL(0.05).update(6.0, 64) == AdaptiveKL(0.05)
    assert FixedKL(0.05).update(100.0, 64) == FixedKL(0.05)


@pytest.mark.parametrize("current", [-3.0, 0.0, 5.0, 6.5, 60.0])
def test_adaptive_controller_equals_the_reference(current: float) -> None:
    controller, expected = AdaptiveKL(0.2, target=6.0, horizon=1000), 0.2
    for n_steps in (8, 64, 512):
        controller, expected = controller.update(current, n_steps), adaptive_kl(expected, current, 6.0, n_steps, 1000)
    assert controller.value == pytest.approx(expected, rel=1e-12)


def test_a_lost_kl_does_not_poison_the_coefficient() -> None:
    with pytest.raises(InvalidArgumentError, match="nan"):
        AdaptiveKL().update(math.nan, 8)
