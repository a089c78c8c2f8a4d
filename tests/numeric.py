"""When two ways of computing the same numbers agree: by the dtype that computed them and the size of the numbers.

Kernels of other processors, instruction sets and thread counts add in another order. What they may differ by is a
number of roundings, each of half a unit in the last place of the largest number that took part, whatever came out of
it: a gradient that is zero in mathematics (that of a key's bias: softmax does not see it) is the noise of the numbers
that cancelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Numbers = Any
"""A tensor, an array or a list of floats."""

ROUNDINGS = 256
"""For a forward and a backward pass of the tiny models: sums over some hundred terms, a dozen operations deep."""


def tolerance(size: float, dtype: torch.dtype = torch.float32, roundings: float = ROUNDINGS) -> float:
    """What numbers as large as `size` may differ by after so many roundings in `dtype`."""
    return roundings * torch.finfo(dtype).eps / 2 * size


def assert_same(
    actual: Numbers | Mapping[str, Numbers],
    expected: Numbers | Mapping[str, Numbers],
    *,
    dtype: torch.dtype = torch.float32,
    roundings: float = ROUNDINGS,
    size: float | None = None,
) -> None:
    """Fails with name, difference and tolerance.

    Args:
        actual, expected: numbers, or numbers by name (the gradients of one model): then the largest of all of them
            counts for each.
        dtype: what they were computed in, which is not always what they are held in.
        size: of the largest number that took part, where that is not one of them.
    """
    ours, theirs = _by_name(actual), _by_name(expected)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    for name, one in ours.items():
        assert one.shape == theirs[name].shape, f"{name}: {tuple(one.shape)}, not {tuple(theirs[name].shape)}"
        assert np.isfinite(one).all(), f"{name}: not finite"
    largest = max((float(np.abs(one).max(initial=0)) for one in theirs.values()), default=0.0)
    allowed = tolerance(largest if size is None else size, dtype, roundings)
    for name, one in ours.items():
        difference = float(np.abs(one - theirs[name]).max(initial=0))
        assert difference <= allowed, f"{name or 'numbers'}: differ by {difference:.3g}, allowed are {allowed:.3g}"


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a model by the parameters' names."""
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def _by_name(numbers: Numbers | Mapping[str, Numbers]) -> dict[str, np.ndarray]:
    named = numbers if isinstance(numbers, Mapping) else {"": numbers}
    return {name: _array(one) for name, one in named.items()}


def _array(numbers: Numbers) -> np.ndarray:
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.detach().double().cpu().numpy()
    return np.asarray(numbers, np.float64)
