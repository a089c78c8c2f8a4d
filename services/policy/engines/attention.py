"""Attention over the cache's rows: one new token a row (decode), or spans of prompt tokens without padding (prefill).

Both are given to the model as one packed row of T tokens with explicit positions. Inside attention both become
blocks of queries per cache row, in which the query heads that share a key head are further queries: keys and values
are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from services.policy.engines.kv_cache import KVCache, LayerCache
from steersman.errors import ConfigError
from steersman.nn.mask_rules import MaskRule, mask_rule

SLOT_ATTENTION = "steersman_slots"

_PIECE = 256
"""Queries of one span in a block: bounds the scores that exist at a time for long prompts."""
_BLOCK_SCORES = 1 << 16
"""Scores of one head in a block of several spans: small enough to stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer scores: factor, last positions seen (itself included), soft cap (Gemma 2), what else restricts the
    positions seen, and the sinks [heads], scores that take attention and give nothing (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    rule: MaskRule | None = None
    sinks: Tensor | None = None

    def mask_key(self, dtype: torch.dtype) -> Hashable:
        return self.window, None if self.rule is None else self.rule.key, dtype


class Step(Protocol):
    """One forward pass: knows which token lies where in the cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
        """q [T, heads, head dim], k [T, kv heads, head dim], v [T, kv heads, value dim], rotated ->
        [T, heads, value dim].

        Stores keys and values.
        """
        ...


def _mask(positions: Tensor, length: int, how: Scores, dtype: torch.dtype) -> Tensor:
    """[..., length]: 0 where a query at `positions` [...] looks, -inf elsewhere."""
    seen, here = torch.arange(length, device=positions.device), positions.unsqueeze(-1)
    hidden = seen > here
    if how.window is not None:
        hidden |= seen <= here - how.window
    if how.rule is not None:
        hidden |= ~how.rule.sees(positions, seen)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)


def _block_attention(q: Tensor, store: LayerCache, rows: slice | Tensor, mask: Tensor, how: Scores) -> Tensor:
    """q [S, kv heads, M, dim] over the first L tokens of S cache rows, mask [S, 1, M or 1, L] ->
    [S, kv heads, M, value dim].
    """
    length = mask.shape[-1]
    values = store.values[rows, :, :length]
    if store.transposed:
        keys = store.keys[rows, :, :, :length]
    else:
        keys = store.keys[rows, :, :length]
        if how.softcap is None and how.sinks is None:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=how.scale)
        keys = keys.transpose(2, 3)
    scores = torch.bmm((q * how.scale).flatten(0, 1), keys.flatten(0, 1)).view(*q.shape[:3], length)
    if how.softcap is not None:
        scores.div_(how.softcap).tanh_().mul_(how.softcap)
    scores = scores.add_(mask)
    if how.sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        count, kv_heads, queries, _ = scores.shape
        sinks = how.sinks.to(scores.dtype).view(1, kv_heads, -1, 1)  # one of each query head, which fold into rows
        sinks = sinks.repeat_interleave(queries // sinks.shape[2], 2).expand(count, -1, -1, 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1].contiguous()
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).view(*q.shape[:3], -1)


@dataclass
class DecodeStep:
    """One token for each of the rows [0, B)."""

    cache: KVCache
    positions: Tensor
    """int64 [B]"""
    longest: int
    """Largest position + 1."""
    _indices: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[Hashable, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
        store = self.cache.layer(layer, k, v)
        rows, kv_heads, dim = k.shape
        key_index, value_index = self._index(kv_heads, dim, store.transposed)
        store.values.view(-1, v.shape[2]).index_copy_(0, value_index, v.reshape(-1, v.shape[2]))
        if store.transposed:
            store.keys.put_(key_index, k)
        else:
            store.keys.view(-1, dim).index_copy_(0, key_index, k.reshape(-1, dim))
        key = how.mask_key(q.dtype)
        mask = self._masks.get(key)
        if mask is None:
            length = min(-(-self.longest // 16) * 16, self.cache.capacity)
            mask = self._masks[key] = _mask(self.positions.view(-1, 1, 1), length, how, q.dtype)
        folded = q.reshape(rows, kv_heads, -1, dim)
        return _block_attention(folded, store, slice(rows), mask, how).reshape(*q.shape[:2], -1)

    def _index(self, heads: int, dim: int, transposed: bool) -> tuple[Tensor, Tensor]:
        """Where the new keys and values go: lines of the flattened storage, or elements of transposed keys."""
        found = self._indices.get((heads, dim, transposed))
        if found is None:
            capacity, device = self.cache.capacity, self.positions.device
            rows = torch.arange(len(self.positions), device=device)[:, None] * heads
            lines = rows + torch.arange(heads, device=device)
            value_index = (lines * capacity + self.positions[:, None]).view(-1)
            key_index = value_index
            if transposed:
                elements = lines[:, :, None] * dim + torch.arange(dim, device=device)
                key_index = elements * capacity + self.positions[:, None, None]
            found = self._indices[heads, dim, transposed] = key_index, value_index
        return found


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens [start, end) of one row; tokens before `start` are in the cache or come from `donor`."""

    row: int
    start: int
    end: int
    donor: int | None = None
    """Row whose first `start` tokens are the same; it comes earlier in this step or ran before."""


@dataclass
class _Block:
    """Queries of several spans, padded to the longest."""

    rows: Tensor
    """int64 [S]"""
    index: Tensor
    """int64 [S, n], which packed token is a query; padding repeats the last."""
    real: Tensor
    """int64 [tokens], places of the real queries in the flattened block"""
    tokens: Tensor
    """int64 [tokens], the packed tokens at these places"""
    positions: Tensor
    """int64 [S, n]"""
    length: int
    masks: dict[Hashable, Tensor] = field(default_factory=dict)

    def mask(self, how: Scores, dtype: torch.dtype, group: int) -> Tensor:
        key = (group, how.mask_key(dtype))
        found = self.masks.get(key)
        if found is None:
            found = _mask(self.positions, self.length, how, dtype).repeat(1, group, 1).unsqueeze(1)
            self.masks[key] = found
        return found


class PrefillStep:
    """Spans of several tokens, one after the other in the packed row: prompts, or a draft of what comes next."""

    def __init__(self, cache: KVCache, spans: Sequence[Span], device: torch.device) -> None:
        self.cache = cache
        self.spans = spans
        self._device = device
        self._blocks = [self._block(pieces) for pieces in _grouped(spans)]

    def _block(self, pieces: Sequence[_Piece]) -> _Block:
        starts, ends, offsets = (
            np.array([[getattr(piece, name)] for piece in pieces]) for name in ("start", "end", "offset")
        )
        steps = np.arange((ends - starts).max())
        clipped = np.minimum(steps, ends - starts - 1)
        index = offsets + clipped
        real = np.flatnonzero(steps < ends - starts)
        rows = np.array([piece.row for piece in pieces])
        length = min(-(-int(ends.max()) // 16) * 16, self.cache.capacity)
        tokens = index.reshape(-1)[real]
        on_device = [torch.from_numpy(one).to(self._device) for one in (rows, index, real, tokens, starts + clipped)]
        return _Block(on_device[0], on_device[1], on_device[2], on_device[3], on_device[4], length)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
        self.store(layer, k, v)
        store = self.cache.layer(layer, k, v)
        kv_heads, dim = k.shape[1:]
        group = q.shape[1] // kv_heads
        out = torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)
        for block in self._blocks:
            count, widest = block.index.shape
            queries = q[block.index].view(count, widest, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
            folded = queries.reshape(count, kv_heads, group * widest, dim)
            found = _block_attention(folded, store, block.rows, block.mask(how, q.dtype, group), how)
            found = found.view(count, kv_heads, group, widest, -1).permute(0, 3, 1, 2, 4)
            out[block.tokens] = found.reshape(count * widest, q.shape[1], -1)[block.real]
        return out

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes keys [T, kv heads, head dim] and values [T, kv heads, value dim], and copies the shared prefixes."""
        store = self.cache.layer(layer, k, v)
        offset = 0
        for span in self.spans:
            count = span.end - span.start
            if span.donor is not None:
                self.cache.copy(store, span.donor, span.row, span.start)
            place = slice(span.start, span.end)
            store.values[span.row, :, place] = v[offset : offset + count].transpose(0, 1)
            keys = k[offset : offset + count]
            if store.transposed:
                store.keys[span.row, :, :, place] = keys.permute(1, 2, 0)
            else:
                store.keys[span.row, :, place] = keys.transpose(0, 1)
            offset += count


class _Piece(NamedTuple):
    """Queries [start, end) of one row; `offset`: where they begin in the packed row."""

    row: int
    start: int
    end: int
    offset: int

    @property
    def queries(self) -> int:
        return self.end - self.start


def _grouped(spans: Sequence[Span]) -> list[list[_Piece]]:
    """The spans in pieces, in groups of similar size."""
    pieces: list[_Piece] = []
    offset = 0
    for span in spans:
        for start in range(span.start, span.end, _PIECE):
            pieces.append(_Piece(span.row, start, min(start + _PIECE, span.end), offset + start - span.start))
        offset += span.end - span.start
    pieces.sort(key=lambda piece: (piece.queries, piece.end))
    groups: list[list[_Piece]] = []
    for piece in pieces:
        if groups:
            ends = [piece.end, *(one.end for one in groups[-1])]
            similar = piece.queries <= 2 * groups[-1][0].queries and max(ends) <= 2 * min(ends)
            if similar and len(ends) * piece.queries * max(ends) <= _BLOCK_SCORES:
                groups[-1].append(piece)
                continue
        groups.append([piece])
    return groups


def _slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | MaskRule | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    steersman_step: Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function behind transformers' AttentionInterface: query [1, heads, T, dim] -> [1, T, heads, dim]."""
    if steersman_step is None or isinstance(attention_mask, Tensor):
        raise ConfigError(
            f"{type(module).__name__} {'drops keyword arguments' if steersman_step is None else 'makes its own masks'}"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = Scores(scale, softcap=softcap, rule=attention_mask, sinks=s_aux)
    return steersman_step.attend(module.layer_idx, q, k, v, how).unsqueeze(0), None


AttentionInterface.register(SLOT_ATTENTION, _slot_attention)
AttentionMaskInterface.register(SLOT_ATTENTION, mask_rule)
