"""Which keys a query sees, as the model itself says it.

A transformers model describes its attention masks (causal, windows, chunks) by a function of two positions and asks the
attention implementation to make a mask of it. Ours keep the function: what is packed or cached without padding asks it
with the true positions of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function


@dataclass(frozen=True, slots=True, eq=False)
class MaskRule:
    """Handed through the model in place of a mask."""

    function: Callable[..., Any]
    """(batch, head, query position, key position) -> bool."""
    key: Hashable
    """Equal for equal rules."""

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool [..., L, K] of positions int64 [..., L] and [..., K] of one sequence each."""
        zero = torch.zeros((), dtype=torch.long, device=queries.device)
        allowed: Tensor = self.function(zero, zero, queries[..., :, None], keys[..., None, :])
        return allowed


def mask_rule(*, mask_function: Callable[..., Any] = causal_mask_function, **_: Any) -> MaskRule | None:
    """The function behind transformers' AttentionMaskInterface; None: everything up to the query's own position."""
    return None if mask_function is causal_mask_function else MaskRule(mask_function, _key(mask_function))


def _key(value: Any) -> Hashable:
    """What a function is made of: its code, and what it has closed over."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), tuple(value.flatten().tolist())) if value.numel() <= 64 else id(value)
    if isinstance(value, (tuple, list)):
        return tuple(_key(one) for one in value)
    if callable(value) and hasattr(value, "__code__"):
        return (value.__code__, *(_key(cell.cell_contents) for cell in value.__closure__ or ()))
    return value if isinstance(value, Hashable) else id(value)
