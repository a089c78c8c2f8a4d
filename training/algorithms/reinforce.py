"""REINFORCE (Williams 1992) with the batch's mean as baseline, and PPO's clip where a batch makes several updates.

R_i = score_i - beta sum_t KL_t,   A_i = R_i - mean over the batch (whitened by default)
L   = mean_t max(-A_i rho_t, -A_i clip(rho_t))
"""

from __future__ import annotations

from torch import Tensor

from steersman.config.algorithms import ReinforceSpec
from training.algorithms.method import Base, Estimates, ForwardPass, LossStats, Part, Totals, k1, register
from training.batch import SampleBatch
from training.mathematics import advantages, losses
from training.mathematics.moments import whiten


@register(ReinforceSpec)
class Reinforce(Base):
    def estimate(self, batch: SampleBatch, old: Tensor, values: Tensor | None, beta: float) -> Estimates:
        kl = k1(old, batch)
        advantage = advantages.reinforce(self.outcomes(batch, kl, beta))
        if self.stage.whiten_advantages:
            advantage = whiten(advantage)
        return Estimates(old, kl, advantages.to_tokens(advantage, batch.lengths))

    def denominator(self, totals: Totals) -> float:
        return totals.tokens

    def loss(self, forward: ForwardPass, part: Part, totals: Totals) -> tuple[Tensor, LossStats]:
        loss, stats = losses.ppo_policy_loss(
            forward.logprobs,
            part.old_logprobs,
            part.advantages,
            denominator=totals.tokens,
            clip_low=self.stage.clip,
            dual_clip=self.stage.dual_clip,
            weights=self.weights(part),
            kl=self.kl_term(part),
        )
        return loss, LossStats(stats)
