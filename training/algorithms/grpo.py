"""GRPO (Shao et al. 2024, DeepSeekMath, equation 3): an answer against its group, in the group's standard deviations.

R_i = score_i - beta sum_t KL_t,   A_i = (R_i - mean) / (std + 1e-4) over the answers to a prompt
L   = mean_i mean_t max(-A_i rho_t, -A_i clip(rho_t))
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from steersman.config.algorithms import GrpoSpec
from training.algorithms.method import Base, Estimates, ForwardPass, LossStats, Part, Totals, k1, register
from training.batch import SampleBatch
from training.mathematics import advantages, losses


@register(GrpoSpec)
class Grpo(Base):
    scale_by_std = True
    average: Literal["tokens", "samples"] = "samples"
    clip_high: float | None = None
    """None: as `clip`."""

    def estimate(self, batch: SampleBatch, old: Tensor, values: Tensor | None, beta: float) -> Estimates:
        kl = k1(old, batch)
        outcomes = self.outcomes(batch, kl, beta)
        return Estimates(old, kl, advantages.grpo(outcomes, batch.group, scale_by_std=self.scale_by_std))

    def denominator(self, totals: Totals) -> float:
        return totals.samples

    def loss(self, forward: ForwardPass, part: Part, totals: Totals) -> tuple[Tensor, LossStats]:
        loss, stats = losses.grpo_loss(
            forward.logprobs,
            part.old_logprobs,
            part.advantages,
            part.lengths,
            average=self.average,
            denominator=self.denominator(totals),
            clip_low=self.stage.clip,
            clip_high=self.clip_high,
            dual_clip=self.stage.dual_clip,
            weights=self.weights(part),
            kl=self.kl_term(part),
        )
        return loss, LossStats(stats)
