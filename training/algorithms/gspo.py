"""GSPO (Zheng et al. 2025, arXiv 2507.18071): one ratio an answer, the geometric mean of its tokens' ratios.

A_i as in GRPO,   s_i = (pi(y_i) / pi_old(y_i)) ^ (1 / |y_i|)
L   = mean_i max(-A_i s_i, -A_i clip(s_i, 1 - clipLow, 1 + clipHigh))
"""

from __future__ import annotations

from torch import Tensor

from steersman.config.algorithms import GspoSpec
from training.algorithms.grpo import Grpo
from training.algorithms.method import ForwardPass, LossStats, Part, Totals, register
from training.mathematics import losses


@register(GspoSpec)
class Gspo(Grpo):
    def loss(self, forward: ForwardPass, part: Part, totals: Totals) -> tuple[Tensor, LossStats]:
        options = self.stage.options
        assert isinstance(options, GspoSpec)
        loss, stats = losses.gspo_loss(
            forward.logprobs,
            part.old_logprobs,
            part.advantages,
            part.lengths,
            denominator=totals.samples,
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            weights=self.answer_weights(part),
            kl=self.kl_term(part),
        )
        return loss, LossStats(stats)
