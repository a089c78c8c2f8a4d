"""Implicit language Q-learning (Snell et al. 2022, arXiv 2206.11871, section 4; terms and averages as in trlX).

The tokens that the policy said are actions a_t, each from the state s_t before it; r_t is the reward right after it.

    y_t   = r_t + gamma ((1 - lambda) V(s_{t+1}) + lambda y_{t+1}),  0 behind a conversation's last action  no gradient
    L_Q   = sum_t sum_i (Q_i(s_t, a_t) - y_t)^2 / T
    L_V   = sum_t |tau - 1[u_t < 0]| u_t^2 / T,   u_t = min_i Qtarget_i(s_t, a_t) - V(s_t)
    L_CQL = - sum_t sum_i log softmax(Q_i(s_t, .))[a_t] / T
    L_LM  = - sum_t exp(beta_lm u_t) log pi(a_t | s_t) / T                                      weight without gradient
    L     = L_Q + L_V + c_cql L_CQL + c_lm L_LM

lambda = 0 is the paper's y, in which a reward at the end of an answer goes one token towards its beginning with each
refresh of the targets; with 1 it is the return itself (Watkins 1989; Sutton and Barto 2018, chapter 12).

Shapes as in `segments`: [T] actions of all conversations one after the other, int64 [N] lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mathematics.segments import check_lengths, reverse_discounted_sum
from training.mathematics.stats import to_floats


@dataclass(frozen=True, eq=False)
class ActionValues:
    """What the model says of the T actions of a micro-batch; fp32."""

    logprobs: Tensor
    """[T], log pi(a | s)."""
    q: Tensor
    """[2, T], Q_i(s, a)."""
    q_logprobs: Tensor
    """[2, T], log softmax(Q_i(s, .))[a]."""
    target_q: Tensor
    """[2, T], of the Polyak targets, without gradient."""
    v: Tensor
    """[T], V(s)."""


@dataclass(frozen=True)
class IlqlStats:
    """Sums over the tokens of a part."""

    tokens: float = 0.0
    loss: float = 0.0
    loss_q: float = 0.0
    loss_v: float = 0.0
    loss_cql: float = 0.0
    loss_lm: float = 0.0
    q: float = 0.0
    v: float = 0.0
    advantage: float = 0.0

    def means(self) -> dict[str, float]:
        """Per token, by metric name."""
        names = ("loss", "loss_q", "loss_v", "loss_cql", "loss_lm", "q", "v", "advantage")
        return {name: getattr(self, name) / max(self.tokens, 1.0) for name in names}


def next_values(v: Tensor, lengths: Tensor) -> Tensor:
    """[T], V of the state after each action: of the next action's, 0 behind a conversation's last one."""
    check_lengths(v, lengths)
    after = torch.cat([v[1:], v.new_zeros(min(1, len(v)))])
    ends = lengths.cumsum(0)[lengths > 0] - 1
    return after.index_fill(0, ends, 0.0)


def ilql_loss(
    values: ActionValues,
    rewards: Tensor,
    lengths: Tensor,
    *,
    gamma: float,
    lam: float,
    tau: float,
    cql: float,
    lm: float,
    lm_beta: float,
    denominator: float,
) -> tuple[Tensor, IlqlStats]:
    """(this part's share of the loss, what it was made of).

    Args:
        rewards: fp32 [T].
        denominator: actions of the whole optimizer step, over all parts and ranks.
    """
    one_step = rewards + gamma * (1.0 - lam) * next_values(values.v.detach(), lengths)
    target = reverse_discounted_sum(one_step, gamma * lam, lengths)
    of_data = values.target_q.detach().amin(0)
    above = of_data - values.v
    weight = torch.where(above.detach() < 0, above.new_tensor(1.0 - tau), above.new_tensor(tau))
    loss_q = (values.q - target).square().sum()
    loss_v = (weight * above.square()).sum()
    loss_cql = -values.q_logprobs.sum()
    loss_lm = -((lm_beta * above.detach()).exp() * values.logprobs).sum()
    loss = loss_q + loss_v + cql * loss_cql + lm * loss_lm
    parts = (loss, loss_q, loss_v, loss_cql, loss_lm, values.q.amin(0).sum(), values.v.sum(), above.sum())
    return loss / denominator, IlqlStats(float(len(rewards)), *to_floats(*parts))


@torch.no_grad()
def move_targets(targets: list[Tensor], parameters: list[Tensor], rate: float) -> None:
    """target <- (1 - rate) target + rate parameter, in place (Polyak averaging)."""
    torch._foreach_lerp_(targets, parameters, rate)
