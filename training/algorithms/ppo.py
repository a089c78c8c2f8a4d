"""PPO (Schulman et al. 2017), for language models as Ziegler et al. 2019 have it.

    r_t = -beta (log pi_old - log pi_ref)_t, and the score on the last token
    A_t = GAE(r, V; gamma, lambda),  R_t = A_t + V_t
    L   = mean_t max(-A_t rho_t, -A_t clip(rho_t)) + c mean_t max((V - R)^2, (V_clipped - R)^2) / 2

PPO-ptx (InstructGPT, equation 2) adds the language-model loss on demonstrations.
"""

from __future__ import annotations

from torch import Tensor

from steersman.config.algorithms import PpoSpec
from steersman.config.manifest import RlStage
from training.algorithms.method import Base, Estimates, ForwardPass, LossStats, Part, Totals, k1, register
from training.batch import SampleBatch
from training.mathematics import advantages, losses, rewards
from training.mathematics.moments import whiten


@register(PpoSpec)
class Ppo(Base):
    def __init__(self, stage: RlStage) -> None:
        super().__init__(stage)
        assert isinstance(stage.options, PpoSpec)
        self.ppo = stage.options
        self.critic = self.ppo.critic
        self.ptx_coefficient = self.ppo.ptx_coefficient

    def estimate(self, batch: SampleBatch, old: Tensor, values: Tensor | None, beta: float) -> Estimates:
        assert values is not None
        kl = k1(old, batch)
        token_rewards = rewards.token_rewards(self.scores(batch), kl, batch.lengths, beta)
        if self.ppo.whiten_rewards:
            token_rewards = whiten(token_rewards, shift_mean=False)
        advantage, returns = advantages.gae(
            token_rewards, values, batch.lengths, gamma=self.ppo.gamma, lam=self.ppo.lam
        )
        if self.stage.whiten_advantages:
            advantage = whiten(advantage)
        return Estimates(old, kl, advantage, values, returns)

    def denominator(self, totals: Totals) -> float:
        return totals.tokens

    def loss(self, forward: ForwardPass, part: Part, totals: Totals) -> tuple[Tensor, LossStats]:
        assert forward.values is not None
        assert part.old_values is not None
        assert part.returns is not None
        loss, policy = losses.ppo_policy_loss(
            forward.logprobs,
            part.old_logprobs,
            part.advantages,
            denominator=totals.tokens,
            clip_low=self.stage.clip,
            dual_clip=self.stage.dual_clip,
            weights=self.weights(part),
            kl=self.kl_term(part),
        )
        value_loss, value = losses.value_loss(
            forward.values,
            part.old_values,
            part.returns,
            denominator=totals.tokens,
            clip=self.ppo.critic.clip or None,
        )
        if self.ppo.critic.kind == "valueHead":  # it shares the policy's trunk
            value_loss = value_loss * self.ppo.critic.coefficient
        return value_loss if part.only_critic else loss + value_loss, LossStats(policy, value)
