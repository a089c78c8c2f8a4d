"""Statistics of losses, kept as sums so that they aggregate over micro-batches and ranks in any order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


def merge(parts: Iterable[S]) -> S:
    """One statistics object for all `parts` (at least one): fields named `*_max` by maximum, the others by sum."""
    parts = list(parts)
    values: dict[str, Any] = {}
    for field in fields(parts[0]):  # type: ignore[arg-type]
        reduce = max if field.name.endswith("_max") else sum
        values[field.name] = reduce(getattr(part, field.name) for part in parts)
    return type(parts[0])(**values)


def to_floats(*scalars: Tensor) -> list[float]:
    """Python floats of 0-d tensors, with one transfer from the device for all of them."""
    return torch.stack([scalar.detach().double() for scalar in scalars]).tolist()


def sum_of(mask_or_values: Tensor) -> Tensor:
    """0-d fp64 sum of a tensor (a bool mask counts)."""
    return mask_or_values.detach().sum(dtype=torch.float64)


def max_of(values: Tensor) -> Tensor:
    """0-d maximum, 0 for an empty tensor (a micro-batch may hold only empty responses)."""
    return values.detach().max() if values.numel() else values.new_zeros(())
