"""The layers of a `LlamaDecoder` for a few rows on a CPU, in float32; see `kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from services.policy.engines import kernels
from services.policy.engines.attention import DecodeStep, Scores
from services.policy.engines.hardware import Layout
from services.policy.engines.weights import Linear

MOST_SCORES = 1 << 19
"""Rows times tokens times query width up to which one thread attends sooner than several tensor operations."""


class Norm(Protocol):
    array: np.ndarray
    eps: float


class Layer(Protocol):
    """What is computed with of a layer of a `LlamaDecoder`."""

    size: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    scores: Scores
    qkv: Linear
    out: Linear
    gate: Linear
    up: Linear
    gate_up: Linear | None
    """Both in one; None: they are apart."""
    down: Linear

    @property
    def input_norm(self) -> Norm: ...
    @property
    def post_norm(self) -> Norm: ...


class _Buffer(NamedTuple):
    tensor: Tensor
    array: np.ndarray
    """The same memory."""

    @staticmethod
    def of(rows: int, width: int) -> _Buffer:
        tensor = torch.empty(rows, width)
        return _Buffer(tensor, tensor.numpy())


class _Buffers:
    """What a layer computes, one layer after the other in the same memory."""

    def __init__(self, layer: Layer, rows: int) -> None:
        self.x = _Buffer.of(rows, layer.size)
        """The residual stream."""
        self.normed = _Buffer.of(rows, layer.size)
        self.mixed = _Buffer.of(rows, (layer.heads + 2 * layer.kv_heads) * layer.head_dim)
        """Queries, keys and values."""
        self.attended = _Buffer.of(rows, layer.heads * layer.head_dim)
        self.gate_up = _Buffer.of(rows, 2 * layer.hidden)
        self.hidden = _Buffer.of(rows, layer.hidden)


class FewRows:
    def __init__(self, layers: Sequence[Layer], layout: Layout) -> None:
        self._layers = layers
        # Products in oneDNN's layout come with what follows them, but for a single row.
        self._most_rows = 1 if layout == "packed" else MOST_SCORES
        self._query_width = layers[0].heads * layers[0].head_dim
        self._buffers: dict[int, _Buffers] = {}

    def fits(self, step: DecodeStep) -> bool:
        rows = len(step.positions)
        if len(step.cache.layers) < len(self._layers):
            return False  # nothing was stored yet: the first prompt has one token
        return rows <= self._most_rows and rows * step.longest * self._query_width <= MOST_SCORES

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: DecodeStep) -> Tensor:
        """x [B, size], cos and signed sin [B, head dim] -> [B, size], valid until the next call."""
        rows = len(x)
        if rows not in self._buffers:
            self._buffers[rows] = _Buffers(self._layers[0], rows)
        buffers = self._buffers[rows]
        buffers.x.tensor.copy_(x)
        places = cos.numpy(), sin.numpy(), step.positions.numpy()
        for index, layer in enumerate(self._layers):
            keys, values = step.cache.layers[index].arrays
            _forward(layer, buffers, *places, keys, values)
        return buffers.x.tensor


def _forward(
    layer: Layer,
    at: _Buffers,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
) -> None:
    kernels.rms_norm(at.x.array, layer.input_norm.array, layer.input_norm.eps, at.normed.array)
    layer.qkv.into(at.normed.tensor, at.mixed.tensor)
    window = layer.scores.window or 0
    kernels.attend(at.mixed.array, cos, sin, positions, keys, values, layer.scores.scale, window, at.attended.array)
    layer.out.accumulate(at.attended.tensor, at.x.tensor)
    kernels.rms_norm(at.x.array, layer.post_norm.array, layer.post_norm.eps, at.normed.array)
    if layer.gate_up is None:
        layer.gate.into(at.normed.tensor, at.gate_up.tensor[:, : layer.hidden])
        layer.up.into(at.normed.tensor, at.gate_up.tensor[:, layer.hidden :])
    else:
        layer.gate_up.into(at.normed.tensor, at.gate_up.tensor)
    kernels.silu_multiply(at.gate_up.array, at.hidden.array)
    layer.down.accumulate(at.hidden.tensor, at.x.tensor)
