"""NLPO (Ramamurthy et al. 2023, arXiv 2210.01241; RL4LMs): PPO over the tokens that an older policy thinks likely.

    M_t     = the smallest set of tokens that holds `topP` of pi_mask(. | y_<t),  y_t itself included
    pi~(v)  = pi(v) / sum_{u in M_t} pi(u)  for v in M_t, else 0;   samples are drawn from pi~
    L       = PPO's, with rho_t = pi~(y_t) / pi~_old(y_t) and KL_t = log pi~(y_t) - log pi_ref(y_t)

pi_mask is the policy as it was at the last step that `refreshEvery` divides. The engine holds it beside the policy and
draws with it; the trainer computes the same sets again. A token at the edge of a set, where rounding may differ, was
drawn all the same, which is why it belongs to the trainer's set. The KL is that of what is drawn, an unbiased estimate
of KL(pi~ || pi_ref); RL4LMs takes log pi - log pi_ref.
"""

from __future__ import annotations

from steersman.config.algorithms import NlpoSpec
from steersman.config.manifest import RlStage
from training.algorithms.method import Mask, register
from training.algorithms.ppo import Ppo


@register(NlpoSpec)
class Nlpo(Ppo):
    def __init__(self, stage: RlStage) -> None:
        super().__init__(stage)
        assert isinstance(stage.options, NlpoSpec)
        self.mask = Mask(stage.options.top_p, stage.options.refresh_every)
