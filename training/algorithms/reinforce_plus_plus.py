"""REINFORCE++ (Hu 2025, arXiv 2501.03262): PPO without a critic.

    r_t = -beta KL_t, and the score on the last token
    A_t = sum of r from t to the end, whitened over all tokens of the batch
    L   = mean_t max(-A_t rho_t, -A_t clip(rho_t))

With `groupBaseline` the mean score of a prompt's samples is taken off the score first.
"""

from __future__ import annotations

from torch import Tensor

from steersman.config.algorithms import ReinforcePlusPlusSpec
from training.algorithms.method import Estimates, k1, register
from training.algorithms.reinforce import Reinforce
from training.batch import SampleBatch
from training.mathematics import advantages, rewards, segments
from training.mathematics.moments import whiten


@register(ReinforcePlusPlusSpec)
class ReinforcePlusPlus(Reinforce):
    def estimate(self, batch: SampleBatch, old: Tensor, values: Tensor | None, beta: float) -> Estimates:
        options = self.stage.options
        assert isinstance(options, ReinforcePlusPlusSpec)
        kl, scores = k1(old, batch), self.scores(batch)
        if options.group_baseline:
            scores = advantages.grpo(scores, batch.group, scale_by_std=False)
        token_rewards = rewards.token_rewards(scores, kl, batch.lengths, beta)
        returns = segments.reverse_discounted_sum(token_rewards, 1.0, batch.lengths)
        return Estimates(old, kl, whiten(returns) if self.stage.whiten_advantages else returns)
