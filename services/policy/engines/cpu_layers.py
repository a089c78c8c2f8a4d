"""The layers of a `LlamaDecoder` when it decodes on a CPU: products, and one call of `kernels` between two of them."""

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
from steersman.nn.hardware import array_of

MOST_SCORES = 1 << 19
"""Rows times tokens times query width up to which the kernels are taken in float32: beyond, batched products win."""
FEW_ROWS = 2
"""Rows up to which `kernels.multiply` reads bfloat16 weights faster than oneDNN's product."""
_WORTH_A_THREAD = 1 << 17
"""The same, in either number format, above which all threads attend."""


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

    def gated(self, normed: Tensor) -> Tensor: ...
    @property
    def input_norm(self) -> Norm: ...
    @property
    def post_norm(self) -> Norm: ...
    @property
    def head_norms(self) -> tuple[Norm, Norm] | None: ...


class _Buffer(NamedTuple):
    tensor: Tensor
    array: np.ndarray
    """The same memory."""

    @staticmethod
    def of(rows: int, width: int, dtype: torch.dtype) -> _Buffer:
        tensor = torch.empty(rows, width, dtype=dtype)
        return _Buffer(tensor, array_of(tensor))


class _Buffers:
    """What a layer computes, one layer after the other in the same memory."""

    def __init__(self, layer: Layer, rows: int, dtype: torch.dtype) -> None:
        self.x = _Buffer.of(rows, layer.size, torch.float32)
        """The residual stream."""
        self.normed = _Buffer.of(rows, layer.size, dtype)
        self.mixed = _Buffer.of(rows, (layer.heads + 2 * layer.kv_heads) * layer.head_dim, dtype)
        """Queries, keys and values."""
        self.attended = _Buffer.of(rows, layer.heads * layer.head_dim, dtype)
        self.gate_up = _Buffer.of(rows, 2 * layer.hidden, dtype)
        self.hidden = _Buffer.of(rows, layer.hidden, dtype)
        self.nothing = _Buffer.of(0, layer.size, dtype).array
        """To be added to the residual stream."""
        self.no_norms = (np.empty(0, np.float32), np.empty(0, np.float32))


class _Places(NamedTuple):
    """Where the rows of a step are; see `kernels.attend`."""

    cos: np.ndarray
    sin: np.ndarray
    positions: np.ndarray
    threads: int


class CpuLayers:
    """A few rows have their activations in float32 whatever the weights are, many rows of bfloat16 in bfloat16; the
    residual stream is float32.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, layout: Layout) -> None:
        self._layers = layers
        self._dtype = dtype
        # float32 products in oneDNN's layout come with what follows them, but for a single row.
        self._most_rows = 1 if layout == "packed" else MOST_SCORES
        self._query_width = layers[0].heads * layers[0].head_dim
        self._buffers: dict[int, _Buffers] = {}

    def fits(self, step: DecodeStep) -> bool:
        if len(step.cache.layers) < len(self._layers):
            return False  # nothing was stored yet: the first prompt has one token
        if self._dtype == torch.bfloat16:
            return True
        rows = len(step.positions)
        return rows <= self._most_rows and rows * step.longest * self._query_width <= MOST_SCORES

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: DecodeStep) -> Tensor:
        """x [B, size], cos and signed sin [B, head dim] -> float32 [B, size], valid until the next call."""
        rows = len(x)
        few = self._dtype == torch.float32 or rows <= FEW_ROWS
        if rows not in self._buffers:
            self._buffers[rows] = _Buffers(self._layers[0], rows, torch.float32 if few else self._dtype)
        buffers = self._buffers[rows]
        buffers.x.tensor.copy_(x)
        many = rows * step.longest * self._query_width > _WORTH_A_THREAD
        threads = torch.get_num_threads() if many else 1
        places = _Places(cos.float().numpy(), sin.float().numpy(), step.positions.numpy(), threads)
        if few:
            for index, layer in enumerate(self._layers):
                _forward_few(layer, buffers, places, *step.cache.layers[index].arrays)
            return buffers.x.tensor
        added: Tensor | None = None
        for index, layer in enumerate(self._layers):
            added = _forward_many(layer, buffers, added, places, *step.cache.layers[index].arrays)
        return buffers.x.tensor if added is None else buffers.x.tensor.add_(added)


def _norm(norm: Norm, at: _Buffers, more: np.ndarray, threads: int) -> None:
    kernels.rms_norm(at.x.array, more, norm.array, norm.eps, at.normed.array, threads)


def _attend(
    layer: Layer, at: _Buffers, mixed: np.ndarray, places: _Places, keys: np.ndarray, values: np.ndarray
) -> None:
    norms, eps = at.no_norms, 0.0
    if layer.head_norms is not None:
        of_queries, of_keys = layer.head_norms
        norms, eps = (of_queries.array, of_keys.array), of_queries.eps
    cos, sin, positions, threads = places
    scale, window = layer.scores.scale, layer.scores.window or 0
    kernels.attend(mixed, cos, sin, positions, keys, values, norms, eps, scale, window, at.attended.array, threads)


def _forward_few(layer: Layer, at: _Buffers, places: _Places, keys: np.ndarray, values: np.ndarray) -> None:
    """A few rows."""
    _norm(layer.input_norm, at, at.nothing, places.threads)
    layer.qkv.into(at.normed.tensor, at.mixed.tensor)
    _attend(layer, at, at.mixed.array, places, keys, values)
    layer.out.accumulate(at.attended.tensor, at.x.tensor)
    _norm(layer.post_norm, at, at.nothing, places.threads)
    if layer.gate_up is None:
        layer.gate.into(at.normed.tensor, at.gate_up.tensor[:, : layer.hidden])
        layer.up.into(at.normed.tensor, at.gate_up.tensor[:, layer.hidden :])
    else:
        layer.gate_up.into(at.normed.tensor, at.gate_up.tensor)
    kernels.silu_multiply(at.gate_up.array, at.hidden.array)
    layer.down.accumulate(at.hidden.tensor, at.x.tensor)


def _forward_many(
    layer: Layer, at: _Buffers, added: Tensor | None, places: _Places, keys: np.ndarray, values: np.ndarray
) -> Tensor:
    """Many rows in bfloat16; `added` still belongs to the residual stream, as does what is returned."""
    _norm(layer.input_norm, at, at.nothing if added is None else array_of(added), places.threads)
    _attend(layer, at, array_of(layer.qkv(at.normed.tensor)), places, keys, values)
    _norm(layer.post_norm, at, array_of(layer.out(at.attended.tensor)), places.threads)
    return layer.down(layer.gated(at.normed.tensor))
