"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740): the whole answer is one action, its baseline the other answers.

R_i = score_i - beta sum_t KL_t,   A_i = R_i - mean of the others' R
L   = mean_i max(-A_i rho_i, -A_i clip(rho_i)),   rho_i = pi(y_i) / pi_old(y_i)
"""

from __future__ import annotations

from torch import Tensor

from steersman.config.algorithms import RlooSpec
from training.algorithms.method import Base, Estimates, ForwardPass, LossStats, Part, Totals, k1, register
from training.batch import SampleBatch
from training.mathematics import advantages, losses


@register(RlooSpec)
class Rloo(Base):
    def estimate(self, batch: SampleBatch, old: Tensor, values: Tensor | None, beta: float) -> Estimates:
        kl = k1(old, batch)
        return Estimates(old, kl, advantages.rloo(self.outcomes(batch, kl, beta), batch.group))

    def denominator(self, totals: Totals) -> float:
        return totals.samples

    def loss(self, forward: ForwardPass, part: Part, totals: Totals) -> tuple[Tensor, LossStats]:
        loss, stats = losses.rloo_loss(
            forward.logprobs,
            part.old_logprobs,
            part.advantages * self.answer_weights(part),
            part.lengths,
            denominator=totals.samples,
            clip_low=self.stage.clip,
            kl=self.kl_term(part),
        )
        return loss, LossStats(stats)
