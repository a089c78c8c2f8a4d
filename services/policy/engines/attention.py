"""Attention over the cache's rows: one new token a row (decode), or spans of prompt tokens without padding (prefill).

Both are given to the model as one packed row of T tokens with explicit positions. Grouped query heads are folded
into query rows, so that keys and values are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from services.policy.engines.kv_cache import KVCache, LayerCache
from steersman.errors import ConfigError

SLOT_ATTENTION = "steersman_slots"


class Step(Protocol):
    """One forward pass: knows which token lies where in the cache."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q [T, heads, head dim], k and v [T, kv heads, head dim], rotated -> [T, heads, head dim].

        Stores keys and values. `window`: number of last positions seen, itself included.
        """
        ...


@dataclass
class DecodeStep:
    """One token for each of the rows [0, B)."""

    cache: KVCache
    positions: Tensor
    """int64 [B]"""
    longest: int
    """Largest position + 1."""
    _indices: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int | None, int, torch.dtype], Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        store = self.cache.layer(layer, k)
        rows, kv_heads, dim = k.shape
        key_index, value_index = self._index(kv_heads, dim, store.transposed)
        store.values.view(-1, dim).index_copy_(0, value_index, v.reshape(-1, dim))
        if store.transposed:
            store.keys.put_(key_index, k)
        else:
            store.keys.view(-1, dim).index_copy_(0, key_index, k.reshape(-1, dim))
        length = min(-(-self.longest // 16) * 16, self.cache.capacity)
        group = q.shape[1] // kv_heads
        if softcap is None and not store.transposed:
            out = F.scaled_dot_product_attention(
                q.reshape(rows, kv_heads, group, dim),
                store.keys[:rows, :, :length],
                store.values[:rows, :, :length],
                attn_mask=self._mask(window, 1, length, q.dtype).view(rows, 1, 1, length),
                scale=scale,
            )
            return out.reshape(rows, -1, dim)
        folded = q.reshape(rows * kv_heads, group, dim)
        keys = store.keys[:rows].flatten(0, 1)
        keys = keys[:, :, :length] if store.transposed else keys[:, :length].transpose(1, 2)
        mask = self._mask(window, kv_heads, length, q.dtype)
        if softcap is None:
            scores = torch.baddbmm(mask, folded, keys, alpha=scale)
        else:
            scores = torch.tanh(torch.bmm(folded, keys) * (scale / softcap)) * softcap + mask
        values = store.values[:rows].flatten(0, 1)[:, :length]
        return torch.bmm(torch.softmax(scores, -1), values).view(rows, -1, dim)

    def _index(self, heads: int, dim: int, transposed: bool) -> tuple[Tensor, Tensor]:
        """Where the new keys and values go: rows of the flattened storage, or elements of transposed keys."""
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

    def _mask(self, window: int | None, repeat: int, length: int, dtype: torch.dtype) -> Tensor:
        """[B * repeat, 1, length]: 0 where a row looks, -inf elsewhere."""
        found = self._masks.get((window, repeat, dtype))
        if found is None:
            seen = torch.arange(length, device=self.positions.device)
            here = self.positions[:, None]
            hidden = seen > here
            if window is not None:
                hidden |= seen <= here - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
            found = self._masks[window, repeat, dtype] = mask.repeat_interleave(repeat, 0).unsqueeze(1)
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
class PrefillStep:
    """Spans of prompts, one after the other."""

    cache: KVCache
    spans: Sequence[Span]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        store = self.cache.layer(layer, k)
        self.store(layer, k, v)
        out = torch.empty_like(q)
        offset = 0
        for span in self.spans:
            tokens = slice(offset, offset + span.end - span.start)
            offset = tokens.stop
            if span.start == 0:
                keys, values = k[tokens], v[tokens]
            else:
                keys, values = _read(store, span.row, span.end)
            out[tokens] = _span_attention(q[tokens], keys, values, span.start, scale, window, softcap)
        return out

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes keys and values [T, kv heads, head dim], then copies the shared prefixes."""
        store = self.cache.layer(layer, k)
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


def _read(store: LayerCache, row: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, kv heads, head dim] of a row."""
    values = store.values[row, :, :tokens].transpose(0, 1)
    if store.transposed:
        return store.keys[row, :, :, :tokens].permute(2, 0, 1), values
    return store.keys[row, :, :tokens].transpose(0, 1), values


def _span_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of q [n, heads, dim] at positions start.. over k, v [start + n, kv heads, dim]."""
    count, total = len(q), len(k)
    here = torch.arange(start, total, device=q.device)[:, None]
    seen = torch.arange(total, device=q.device)
    mask = seen <= here
    if window is not None:
        mask &= seen > here - window
    q_h, k_h, v_h = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if softcap is None:
        plain = start == 0 and (window is None or window >= total)
        out = F.scaled_dot_product_attention(
            q_h, k_h, v_h, attn_mask=None if plain else mask, is_causal=plain, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    group = q.shape[1] // k.shape[1]
    folded = q_h.view(1, k.shape[1], group, count, -1)
    scores = torch.tanh(folded @ k_h.unsqueeze(2).transpose(-1, -2) * (scale / softcap)) * softcap
    scores = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (scores @ v_h.unsqueeze(2)).reshape(q.shape[1], count, -1).transpose(0, 1)


def _slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    steersman_step: Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function behind transformers' AttentionInterface: query [1, heads, T, dim] -> [1, T, heads, dim]."""
    if steersman_step is None or s_aux is not None:
        raise ConfigError(
            f"{type(module).__name__} cannot run on the transformers engine "
            f"({'attention sinks' if s_aux is not None else 'it drops keyword arguments'}); use the vllm engine"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return steersman_step.attend(module.layer_idx, q, k, v, scale, sliding_window, softcap).unsqueeze(0), None


AttentionInterface.register(SLOT_ATTENTION, _slot_attention)
AttentionMaskInterface.register(SLOT_ATTENTION, lambda *args, **kwargs: None)
