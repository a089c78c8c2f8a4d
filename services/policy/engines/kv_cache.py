"""Keys and values of the running samples: one row a sample, rows [0, B) in use, bounded by a token budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steersman.nn.hardware import array_of

_ALIGN = 64
"""Row capacities are multiples of this: fewer re-allocations, aligned kernels."""


def row_capacity(tokens: int) -> int:
    """Tokens that a row takes from the budget when it must hold `tokens`."""
    return -(-tokens // _ALIGN) * _ALIGN


@dataclass(slots=True)
class LayerCache:
    """Storage of one layer, keys [rows, kv heads, capacity, head dim], values [..., value dim].

    With `transposed`, keys are [rows, kv heads, head dim, capacity]: the float32 products of a few query rows with
    row-major keys run at a third of the speed on CPU.
    """

    keys: Tensor
    values: Tensor
    transposed: bool
    _arrays: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values on a CPU, the same memory, bfloat16 as uint16."""
        if self._arrays is None:
            self._arrays = array_of(self.keys), array_of(self.values)
        return self._arrays


RowState = dict[int, tuple[Tensor, Tensor]]
"""By layer: keys [kv heads, tokens, head dim], or [kv heads, head dim, tokens] where they are stored transposed, and
values [kv heads, tokens, value dim]."""


class KVCache:
    """A rectangle of `rows` x `capacity` tokens a layer, at most `budget` tokens in all.

    A layer's storage appears when the model first writes to it, in the shape and dtype of what it writes, so that
    nothing about the architecture has to be known. Unused storage is zero: masked positions are multiplied by 0 and
    must be finite.
    """

    def __init__(self, budget: int, max_rows: int) -> None:
        self.budget = budget
        self.max_rows = max_rows
        self.rows = 0
        self.capacity = 0
        self.layers: dict[int, LayerCache] = {}
        self.storage = 0
        """Another number whenever the memory lies elsewhere."""

    def rows_for(self, capacity: int) -> int:
        """Rows of this capacity that the budget holds."""
        return min(self.max_rows, self.budget // capacity)

    def resize(self, capacity: int, used_rows: int, used_tokens: int) -> None:
        """Gives every row `capacity` tokens; keeps the first `used_tokens` of the first `used_rows` rows."""
        self.rows, self.capacity = self.rows_for(capacity), capacity
        self.storage += 1
        for index, old in self.layers.items():
            new = self._allocate(old.keys.shape[2] if old.transposed else old.keys.shape[3], old.values, old.transposed)
            new.values[:used_rows, :, :used_tokens] = old.values[:used_rows, :, :used_tokens]
            if old.transposed:
                new.keys[:used_rows, :, :, :used_tokens] = old.keys[:used_rows, :, :, :used_tokens]
            else:
                new.keys[:used_rows, :, :used_tokens] = old.keys[:used_rows, :, :used_tokens]
            self.layers[index] = new

    def layer(self, index: int, keys: Tensor, values: Tensor) -> LayerCache:
        """The storage of a layer that holds what looks like these, [tokens, kv heads, head dim or value dim]."""
        found = self.layers.get(index)
        if found is None:
            self.storage += 1
            transposed = keys.device.type == "cpu" and keys.dtype == torch.float32
            shape = values.new_empty((0, values.shape[1], 0, values.shape[2]))
            found = self.layers[index] = self._allocate(keys.shape[2], shape, transposed)
        return found

    def _allocate(self, dim: int, like: Tensor, transposed: bool) -> LayerCache:
        heads = like.shape[1]
        key_shape = (self.rows, heads, dim, self.capacity) if transposed else (self.rows, heads, self.capacity, dim)
        return LayerCache(
            keys=_zeros(key_shape, like),
            values=_zeros((self.rows, heads, self.capacity, like.shape[3]), like),
            transposed=transposed,
        )

    def copy(self, layer: LayerCache, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` of a row to another row, in one layer."""
        layer.values[target, :, :tokens] = layer.values[source, :, :tokens]
        if layer.transposed:
            layer.keys[target, :, :, :tokens] = layer.keys[source, :, :, :tokens]
        else:
            layer.keys[target, :, :tokens] = layer.keys[source, :, :tokens]

    def copy_all(self, source: int, target: int, tokens: int) -> None:
        for layer in self.layers.values():
            self.copy(layer, source, target, tokens)

    def take(self, row: int, tokens: int) -> RowState:
        """A copy of the first `tokens` of a row."""
        return {
            index: (
                (layer.keys[row, :, :, :tokens] if layer.transposed else layer.keys[row, :, :tokens]).clone(),
                layer.values[row, :, :tokens].clone(),
            )
            for index, layer in self.layers.items()
        }

    def put(self, row: int, state: RowState, tokens: int) -> None:
        """Puts the first `tokens` of what was taken into a row."""
        for index, (keys, values) in state.items():
            layer = self.layers[index]
            layer.values[row, :, :tokens] = values[:, :tokens]
            if layer.transposed:
                layer.keys[row, :, :, :tokens] = keys[:, :, :tokens]
            else:
                layer.keys[row, :, :tokens] = keys[:, :tokens]

    def clear(self) -> None:
        self.layers.clear()
        self.storage += 1
        self.rows = self.capacity = 0


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros that take memory only where they are written: on CPU by calloc, which `torch.zeros` does not use."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = like.element_size()
    return torch.from_numpy(np.zeros(shape, f"i{size}")).view(like.dtype)
