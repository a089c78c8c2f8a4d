"""Losses of direct preference optimization on log-probability ratios, per pair; TRL's formulas with a soft label.

    d = log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)
    L = s l(d) + (1 - s) l(-d)

s is the share of people who preferred `chosen`: 1 is DPO as it is usually written, 1/2 a tie, whose best d is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

PreferenceLoss = Literal["sigmoid", "ipo", "robust", "hinge"]


def preference_loss(
    loss: PreferenceLoss,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    smoothing: float = 0.0,
    lengths: tuple[Tensor, Tensor] | None = None,
    soft_label: Tensor | None = None,
) -> Tensor:
    """fp32 [P], the loss of every pair.

    Args:
        chosen, rejected: [P] log pi / ref of each answer, summed over its tokens.
        beta: pull to the reference.
        smoothing: share of flipped labels that `sigmoid` (Mitchell 2023) and `robust` (Chowdhury et al. 2024) assume.
        lengths: tokens of both answers [P]; `ipo` averages over them, as its authors do.
        soft_label: [P], share who preferred `chosen`; None: all did.
    """
    difference = chosen - rejected
    if loss == "ipo":
        assert lengths is not None
        difference = chosen / lengths[0].clamp(min=1) - rejected / lengths[1].clamp(min=1)
    preferred = _hard(loss, difference, beta, smoothing)
    if soft_label is None:
        return preferred
    return soft_label * preferred + (1 - soft_label) * _hard(loss, -difference, beta, smoothing)


def _hard(loss: PreferenceLoss, difference: Tensor, beta: float, smoothing: float) -> Tensor:
    if loss == "ipo":
        return (difference - 1 / (2 * beta)).square()
    if loss == "hinge":
        return torch.relu(1 - beta * difference)
    agree, flipped = -F.logsigmoid(beta * difference), -F.logsigmoid(-beta * difference)
    if loss == "robust":
        return ((1 - smoothing) * agree - smoothing * flipped) / (1 - 2 * smoothing)
    return (1 - smoothing) * agree + smoothing * flipped
