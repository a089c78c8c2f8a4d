"""CISPO (MiniMax-M1, arXiv 2506.13585): clips the importance weight instead of the update.

A_i as in GRPO
L   = -sum_i sum_t sg(min(rho_t, weightCap)) A_i log pi_t / all tokens
"""

from __future__ import annotations

from torch import Tensor

from steersman.config.algorithms import CispoSpec
from training.algorithms.grpo import Grpo
from training.algorithms.method import ForwardPass, LossStats, Part, Totals, register
from training.mathematics import losses, segments


@register(CispoSpec)
class Cispo(Grpo):
    def denominator(self, totals: Totals) -> float:
        return totals.tokens

    def loss(self, forward: ForwardPass, part: Part, totals: Totals) -> tuple[Tensor, LossStats]:
        options = self.stage.options
        assert isinstance(options, CispoSpec)
        loss, stats = losses.cispo_loss(
            forward.logprobs,
            part.old_logprobs,
            segments.broadcast(part.advantages, part.lengths),
            denominator=totals.tokens,
            weight_cap=options.weight_cap,
            weights=self.weights(part),
            kl=self.kl_term(part),
        )
        return loss, LossStats(stats)
