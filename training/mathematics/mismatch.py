"""How far the engine that sampled the tokens is from the trainer that learns from them, and the correction.

Engine and trainer compute the same distribution with other kernels (and, when generation runs ahead, other weights).
With r = pi_trainer / pi_engine per token, tokens weighted by min(r, cap) give an estimate that is nearly unbiased and
has bounded variance (truncated importance sampling: Ionides 2008; Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from training.mathematics.kl import k3
from training.mathematics.stats import max_of, sum_of, to_floats


@dataclass(frozen=True)
class MismatchStats:
    """Sums over `count` tokens; merge with `stats.merge`.

    absolute: |log pi_trainer - log pi_engine|. ratio: pi_trainer / pi_engine. kl: k3 of KL(engine || trainer).
    above_cap: tokens whose ratio is above the cap.
    """

    count: float = 0.0
    absolute: float = 0.0
    absolute_max: float = 0.0
    ratio: float = 0.0
    kl: float = 0.0
    above_cap: float = 0.0

    def means(self) -> dict[str, float]:
        """Means by metric name."""
        count = max(self.count, 1.0)
        return {
            "mean_abs": self.absolute / count,
            "max_abs": self.absolute_max,
            "ratio": self.ratio / count,
            "kl": self.kl / count,
            "above_cap": self.above_cap / count,
        }


def truncated_importance_weights(trainer_logprobs: Tensor, engine_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """fp32 [T], without gradient: min(exp(log pi_trainer - log pi_engine), cap).

    `trainer_logprobs` are those before the first update of the step (the loss's `old_logprobs`).
    """
    return (trainer_logprobs - engine_logprobs).detach().exp().clamp(max=cap)


def mismatch_stats(trainer_logprobs: Tensor, engine_logprobs: Tensor, cap: float = 2.0) -> MismatchStats:
    """Statistics of one micro-batch; both [T]."""
    trainer, engine = trainer_logprobs.detach(), engine_logprobs.detach()
    absolute, ratio = (trainer - engine).abs(), (trainer - engine).exp()
    sums = to_floats(
        sum_of(absolute), max_of(absolute), sum_of(ratio), sum_of(k3(engine, trainer)), sum_of(ratio > cap)
    )
    return MismatchStats(float(trainer.numel()), *sums)
