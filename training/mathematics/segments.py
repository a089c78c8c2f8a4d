"""Ragged batches: the tokens of all samples in one row, and `lengths` that says where each sample ends.

Everywhere in `training.mathematics`

    N        samples, T = sum(lengths) response tokens (prompt tokens are not among them)
    lengths  int64 [N]; 0 is an empty response
    values   [T] per-token values, the samples one after another

so there is no padding, no mask, and nothing is ever decided by `token != pad`. The tokens of a response include its
EOS when it has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.errors import InvalidArgumentError


def starts(lengths: Tensor) -> Tensor:
    """int64 [N]: index of each sample's first token (of the next token in the row if the sample is empty)."""
    return lengths.cumsum(0) - lengths


def last_indices(lengths: Tensor) -> Tensor:
    """int64 [N]: index of each sample's last token, -1 where the sample is empty."""
    return torch.where(lengths > 0, lengths.cumsum(0) - 1, -1)


def broadcast(per_sample: Tensor, lengths: Tensor) -> Tensor:
    """[N, ...] -> [T, ...]: give each token the value of its sample; an empty sample gives it to no token."""
    return per_sample.repeat_interleave(lengths, dim=0)


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """[T] -> [N]: sum over each sample's tokens, 0 for an empty sample.

    The sum runs in fp64 over the sample's own tokens in their order, so it does not depend on the samples beside it and
    is the same on every run (no atomics). Differentiable.
    """
    check_lengths(values, lengths)
    if lengths.numel() == 0:
        return values.new_zeros(0)
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True).to(values.dtype)


def segment_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """[T] -> [N]: mean over each sample's tokens, 0 for an empty sample."""
    return segment_sum(values, lengths) / lengths.clamp(min=1)


def reverse_discounted_sum(values: Tensor, discount: float, lengths: Tensor) -> Tensor:
    """[T] -> [T]: y_t = x_t + discount * y_{t+1} inside each sample (nothing follows a sample's last token).

    Done by doubling (Hillis and Steele 1986): after k rounds y_t holds the next 2^k terms, so the number of tensor
    operations is log2 of the longest sample. A token's result depends on its own sample only, bit for bit.
    """
    check_lengths(values, lengths)
    if values.numel() == 0:
        return values.clone()
    index = torch.arange(values.numel(), device=values.device)
    following = broadcast(lengths.cumsum(0) - 1, lengths) - index
    longest = int(lengths.max())
    result, step = values, 1
    while step < longest:
        ahead = torch.where(following >= step, result.roll(-step), torch.zeros_like(result))
        result = result + discount**step * ahead
        step *= 2
    return result


def select(values: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """[T] -> [T']: the tokens of the samples in `keep` (bool [N]); use it with `lengths[keep]` to exclude samples."""
    check_lengths(values, lengths)
    return values[broadcast(keep, lengths)]


def check_lengths(values: Tensor, lengths: Tensor) -> None:
    """Raise InvalidArgumentError unless `lengths` is int64 [N], not negative, and sums to the rows of `values`."""
    if lengths.dtype != torch.int64 or lengths.dim() != 1:
        raise InvalidArgumentError(f"lengths must be int64 [N], got {lengths.dtype} {list(lengths.shape)}")
    if lengths.numel() and int(lengths.min()) < 0:
        raise InvalidArgumentError("lengths must not be negative")
    if int(lengths.sum()) != values.shape[0]:
        raise InvalidArgumentError(f"lengths sum to {int(lengths.sum())}, but there are {values.shape[0]} tokens")
