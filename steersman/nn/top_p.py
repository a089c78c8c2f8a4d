"""The top-p set of a distribution (Holtzman et al. 2019), by one rule for engine and trainer."""

from __future__ import annotations

import torch
from torch import Tensor


def top_p_edges(weights: Tensor, top_p: float) -> Tensor:
    """Of every row the smallest weight of the smallest set that holds `top_p` of the probability.

    Args:
        weights: [B, V] unnormalised probabilities.

    Returns:
        [B, 1]; tokens of equal weight at the edge all belong to the set.
    """
    goal = weights.sum(1, keepdim=True, dtype=torch.float64) * top_p
    vocabulary = weights.shape[1]
    count = min(1024, vocabulary)  # nearly always enough, and far cheaper than a full sort
    while True:
        largest = torch.topk(weights, count, dim=1).values
        sums = largest.double().cumsum(1)
        if count == vocabulary or bool((sums[:, -1:] >= goal).all()):
            return largest.gather(1, torch.searchsorted(sums, goal).clamp_(max=count - 1))
        count = vocabulary


def top_p_sets(scores: Tensor, top_p: float) -> Tensor:
    """bool [B, V]: the top-p set of every row of logits [B, V], temperature applied."""
    weights = (scores - scores.amax(1, keepdim=True)).exp_()
    return weights >= top_p_edges(weights, top_p)


def pack_sets(sets: Tensor) -> Tensor:
    """bool [B, V] -> uint8 [B, ceil(V / 8)], a bit a token: what can be kept for a whole batch."""
    padded = torch.nn.functional.pad(sets, (0, -sets.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded.to(torch.uint8) << _places(sets)).sum(2, dtype=torch.uint8)


def unpack_sets(packed: Tensor, vocabulary: int) -> Tensor:
    """bool [B, V] of what `pack_sets` gave."""
    return ((packed.unsqueeze(2) >> _places(packed)) & 1).flatten(1)[:, :vocabulary].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
