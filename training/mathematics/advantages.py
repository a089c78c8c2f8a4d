"""Advantage estimators. Each is a pure function; none keeps a graph.

`gae` works on tokens. The critic-free ones give one advantage a response [N]; `segments.broadcast(adv, lengths)` gives
it to each of its tokens. They need all responses of a prompt at once: compute them on the whole batch, before it is
split into micro-batches or ranks.

Missing rewards (NaN) must be excluded first: a failed sample takes no part in its group's baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.errors import InvalidArgumentError
from training.mathematics.moments import Moments
from training.mathematics.segments import broadcast, check_lengths, last_indices, reverse_discounted_sum, segment_sum


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) -> (advantages, returns), both fp32 [T].

        delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = sum_l (gamma * lam)^l * delta_{t+l},   return_t = A_t + V_t

    V after the last token is 0, also for a response cut off at the length limit (as lm-human-preferences does; the
    no-EOS penalty is what such a response gets). Shapes: rewards and values [T], lengths int64 [N].
    """
    check_lengths(rewards, lengths)
    check_lengths(values, lengths)
    rewards, values = rewards.detach(), values.detach()
    next_values = values.roll(-1)
    next_values[last_indices(lengths)[lengths > 0]] = 0.0
    advantages = reverse_discounted_sum(rewards + gamma * next_values - values, gamma * lam, lengths)
    return advantages, advantages + values


def rloo(rewards: Tensor, group: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): A_i = R_i - mean of the others of its group.

    rewards fp32 [N], group int64 [N] (any ids; sizes may differ) -> fp32 [N]. A group of one has no others to compare
    with: its advantage is 0.
    """
    index, counts = _groups(rewards, group)
    size = counts[index]
    # k / (k - 1) * (R_i - group mean) is the same number and keeps the digits when rewards are large.
    centred = rewards.detach().double() - _group_sum(rewards, index, counts)[index] / size
    return torch.where(size > 1, centred * size / (size - 1).clamp(min=1), 0.0).to(rewards.dtype)


def grpo(rewards: Tensor, group: Tensor, *, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """Group-relative advantage (DeepSeekMath section 4.1.2): A_i = (R_i - mean) / (std + eps), per group.

    The std is the unbiased one (n - 1), as TRL and verl have it. `scale_by_std=False` is Dr. GRPO (Liu et al. 2025,
    arXiv 2503.20783): only the mean is taken off, so a question that is almost always or almost never solved does not
    weigh more. rewards fp32 [N], group int64 [N] -> fp32 [N]. A group of one has advantage 0.
    """
    index, counts = _groups(rewards, group)
    size = counts[index]
    centred = rewards.detach().double() - _group_sum(rewards, index, counts)[index] / size
    if scale_by_std:
        variance = _group_sum(centred.square(), index, counts) / (counts - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[index] + eps)
    return torch.where(size > 1, centred, 0.0).to(rewards.dtype)


def reinforce(rewards: Tensor, moments: Moments | None = None) -> Tensor:
    """REINFORCE with the batch mean as baseline (Williams 1992): A_i = R_i - mean. fp32 [N] -> fp32 [N].

    `moments` are those of the global batch; None takes those of `rewards`.
    """
    _check_rewards(rewards)
    mean = (Moments.of(rewards) if moments is None else moments).mean
    return (rewards.detach().double() - mean).to(rewards.dtype)


def to_tokens(advantages: Tensor, lengths: Tensor) -> Tensor:
    """fp32 [N] -> fp32 [T]: each token gets its response's advantage."""
    return broadcast(advantages, lengths)


def _groups(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(index of each sample's group [N], size of each group [G])."""
    _check_rewards(rewards)
    if group.shape != rewards.shape:
        raise InvalidArgumentError(f"group {list(group.shape)} and rewards {list(rewards.shape)} must be aligned")
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    return index, counts


def _group_sum(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """fp64 [G]: sum over each group; sorted and summed in order rather than scattered, so that runs repeat exactly."""
    return segment_sum(values.detach().double()[index.argsort(stable=True)], counts)


def _check_rewards(rewards: Tensor) -> None:
    if bool(rewards.isnan().any()):
        raise InvalidArgumentError("a reward is missing (NaN); exclude the sample before advantages are computed")
