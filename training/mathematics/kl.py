"""KL divergence between policy and reference from the log-probabilities of sampled tokens, and its coefficient.

With x sampled from the policy and r = pi_ref(x) / pi(x) (Schulman 2020, "Approximating KL Divergence",
http://joschu.net/blog/kl-approx.html):

    k1 = -log r               unbiased, high variance, may be negative     (lm-human-preferences, InstructGPT)
    k2 = (log r)^2 / 2        biased, low variance
    k3 = (r - 1) - log r      unbiased, low variance, never negative       (GRPO, DeepSeekMath eq. 4)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from steersman.errors import InvalidArgumentError

KLEstimator = Literal["k1", "k2", "k3"]


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[T] fp32: log pi - log pi_ref."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[T] fp32: half the squared log-ratio."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[T] fp32: exp(d) - 1 - d with d = log pi_ref - log pi; expm1 keeps it exact where d is small."""
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference


_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """[T] fp32: the per-token estimate named by `estimator`."""
    return _ESTIMATORS[estimator](logprobs, ref_logprobs)


@dataclass(frozen=True)
class FixedKL:
    """A KL coefficient that never changes (lm-human-preferences `FixedKLController`)."""

    value: float = 0.05

    def update(self, current: float, n_steps: int) -> FixedKL:
        """The same controller."""
        return self


@dataclass(frozen=True)
class AdaptiveKL:
    """A KL coefficient that follows a target (lm-human-preferences `AdaptiveKLController`, Ziegler et al. 2019).

        error = clip(current / target - 1, -0.2, 0.2)
        value <- value * (1 + error * n_steps / horizon)

    `target` and `current` are nats per response (k1 summed over a response's tokens, mean over responses); `n_steps`
    and `horizon` count responses ("episodes" there).
    """

    value: float = 0.05
    target: float = 6.0
    horizon: int = 10_000

    def update(self, current: float, n_steps: int) -> AdaptiveKL:
        """The controller after a batch of `n_steps` responses whose mean KL was `current`."""
        if not math.isfinite(current):
            raise InvalidArgumentError(f"the mean KL is {current}; the KL coefficient cannot follow it")
        error = min(max(current / self.target - 1.0, -0.2), 0.2)
        return replace(self, value=self.value * (1.0 + error * n_steps / self.horizon))
