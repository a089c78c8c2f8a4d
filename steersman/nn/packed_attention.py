"""Attention over a packed row: the function behind the name `steersman_packed`; see `packed.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from steersman.errors import ConfigError
from steersman.nn.kernels import kernels_of
from steersman.nn.mask_rules import MaskRule, mask_rule
from steersman.nn.packed import PACKED_ATTENTION, Block, PackedLayout, Table, tables_of


class _Pad(torch.autograd.Function):
    """[S, ...] -> [B, L, ...] of every block and back; both directions are plain gathers and writes."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.shape = blocks, flat.shape
        return tuple(flat[block.index] for block in blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _flatten(grads, ctx.blocks, ctx.shape), None


class _Unpad(torch.autograd.Function):
    """[B, L, ...] of every block -> [S, ...]: the inverse of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, blocks: tuple[Block, ...], *padded: Tensor) -> Tensor:
        ctx.blocks = blocks
        total = sum(len(block.tokens) for block in blocks)
        return _flatten(padded, blocks, torch.Size((total, *padded[0].shape[2:])))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None]
        for block in ctx.blocks:
            padded = grads[0][block.index]
            padded[block.padding] = 0
            result.append(padded)
        return tuple(result)


def _flatten(padded: Sequence[Tensor], blocks: Sequence[Block], shape: torch.Size) -> Tensor:
    if len(blocks) == 1:
        return padded[0].flatten(0, 1)[blocks[0].inverse]
    flat = padded[0].new_empty(shape)
    for one, block in zip(padded, blocks, strict=True):
        flat[block.tokens] = one.flatten(0, 1)[block.inverse]
    return flat


class _Spread(torch.autograd.Function):
    """q [T, H, D], k [T, KV, D] and v [T, KV, E] -> three tensors for every block, as attention wants them, by kernels.

    Queries [B, KV, H / KV * L, D], keys [B, KV, K, D] with those of the prompt first, values likewise.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, split: int, tables: Sequence[Table]) -> tuple[Tensor, ...]:
        ctx.tables, ctx.split, ctx.shapes = tables, split, (q.shape, k.shape, v.shape)
        spread: list[Tensor] = []
        kernels = kernels_of(q)
        for table in tables:
            rows = kernels.gather_rows(q, table.own)
            spread.append(rows.view(len(rows), k.shape[1], -1, q.shape[2]))
            spread += [kernels.gather_rows(one, table.keys) for one in (k, v)]
        return tuple(spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_q = grads[0].new_empty(ctx.shapes[0])
        for grad, table in zip(grads[::3], ctx.tables, strict=True):
            kernels_of(grad).scatter_rows_(of_q, grad, table.own)
        both = [_of_keys(grads[place::3], ctx.tables, ctx.split, ctx.shapes[place]) for place in (1, 2)]
        return of_q, *both, None, None


def _of_keys(grads: Sequence[Tensor], tables: Sequence[Table], split: int, shape: torch.Size) -> Tensor:
    """[T, KV, D] from the gradients of every block's keys; a prompt's tokens have one from each of its answers."""
    found, shared = grads[0].new_empty(shape), grads[0].new_empty((split, *shape[1:]), dtype=torch.float32)
    prompts, kernels = tables[0].own, kernels_of(grads[0])
    kernels.scatter_rows_(shared, grads[0], prompts)
    for grad, table in zip(grads[1:], tables[1:], strict=True):
        kernels.scatter_rows_(found, grad[:, :, prompts.shape[1] :], table.own)
        kernels.add_blocks_(shared, grad[:, :, : prompts.shape[1]], prompts, table.first, table.last)
    found[:split] = shared
    return found


class _Collect(torch.autograd.Function):
    """What attention gave for every block's queries [B, KV, H / KV * L, E] -> [T, H, E], by kernels."""

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, tables: Sequence[Table], *blocks: Tensor) -> Tensor:
        ctx.tables, ctx.shapes = tables, [block.shape for block in blocks]
        out = blocks[0].new_empty(shape)
        for block, table in zip(blocks, tables, strict=True):
            kernels_of(block).scatter_rows_(out, block, table.own)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        gathered = (kernels_of(grad).gather_rows(grad, table.own) for table in ctx.tables)
        return None, None, *(one.view(shape) for one, shape in zip(gathered, ctx.shapes, strict=True))


def _by_kernels(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, rule: MaskRule | None, scale: float | None
) -> Tensor:
    """[T, H, E] as below, with every block's queries, keys and values in one pass each."""
    tables, fold = tables_of(packed), q.shape[1] // k.shape[1]
    spread = _Spread.apply(q, k, v, packed.prompt_tokens, tables)
    outs = []
    for number, block in enumerate((packed.prompts, *packed.responses)):
        rows, keys, values = spread[3 * number : 3 * number + 3]
        mask = _mask(packed, number, block, rule, fold, q)
        outs.append(_grouped(rows, keys, values, mask, scale))
    found: Tensor = _Collect.apply(torch.Size((*q.shape[:2], v.shape[2])), tables, *outs)
    return found


_SHORT = 256
"""Keys up to which `_ShortAttention` is faster."""


class _ShortAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v of short sequences on a CPU.

    torch's own kernel works in blocks of hundreds of queries and keys: of sequences of some fifty tokens its two passes
    take several times as long as these products. Scores, weights and their slopes are fp32, as they are there, and the
    weights are computed again rather than kept, as there.

    Shapes: q [B KV, R, D]; k [B KV, K, D]; v [B KV, K, E]; mask [B, 1, R, K] to add; returns [B KV, R, E].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        with torch.autocast("cpu", enabled=False):
            weights = _exact_weights(q, k, mask, scale)
            return torch.bmm(weights, v.to(weights.dtype)).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, mask), grad = ctx.saved_tensors, grads[0]
        weights = _exact_weights(q, k, mask, ctx.scale)
        of_v = torch.bmm(weights.to(grad.dtype).transpose(1, 2), grad)
        slopes = torch.bmm(grad.to(weights.dtype), v.to(weights.dtype).transpose(1, 2)).mul_(weights)
        slopes -= weights.mul_(slopes.sum(-1, keepdim=True))
        of_scores = slopes.mul_(ctx.scale).to(q.dtype)
        return torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q), of_v, None, None


def _exact_weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[B KV, R, K], at least fp32: what is lost here is multiplied by what all keys have in common."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.to(exact), k.to(exact).transpose(1, 2)).mul_(scale)
    scores.view(len(mask), -1, *scores.shape[1:]).add_(mask.to(exact))
    return scores.softmax(-1)


def _grouped(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """rows [B, KV, R, D], keys [B, KV, K, D], values [B, KV, K, E], mask [B, 1, R, K] -> [B, KV, R, E]."""
    if not rows.is_cpu or keys.shape[2] > _SHORT:
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    q, k, v = (one.flatten(0, 1) for one in (rows, keys, values))
    found: Tensor = _ShortAttention.apply(q, k, v, mask, rows.shape[-1] ** -0.5 if scale is None else scale)
    return found.unflatten(0, rows.shape[:2])


@dataclass(frozen=True, slots=True)
class _Scores:
    """How a layer scores."""

    scale: float | None
    softcap: float | None
    """Gemma 2."""
    sinks: Tensor | None
    """[H], a score that takes attention and gives nothing (gpt-oss)."""


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, how: _Scores) -> Tensor:
    """Grouped-query attention with the query heads of one key head folded into rows.

    Shapes: query [B, L, H, D]; key [B, K, KV, D]; value [B, K, KV, E]; mask [B, 1, H / KV * L, K] to add; returns
    [B, L, H, E].
    """
    batch, width, heads, dim = query.shape
    kv_heads = key.shape[2]
    fold = heads // kv_heads
    rows = query.view(batch, width, kv_heads, fold, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    if how.softcap is not None or how.sinks is not None:
        out = _weights(rows, keys, mask, how, width) @ values
    else:
        out = _grouped(rows, keys, values, mask, how.scale)
    out = out.view(batch, kv_heads, fold, width, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, width, heads, -1)


def _weights(rows: Tensor, keys: Tensor, mask: Tensor, how: _Scores, width: int) -> Tensor:
    """[B, KV, H / KV * L, K] in the dtype of the keys: softmax in fp32, with soft cap and sinks."""
    scores = rows @ keys.transpose(2, 3) * (rows.shape[-1] ** -0.5 if how.scale is None else how.scale)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = (scores + mask).float()
    if how.sinks is None:
        return scores.softmax(-1).to(keys.dtype)
    sinks = how.sinks.float().view(1, keys.shape[1], -1, 1, 1).expand(len(rows), -1, -1, width, 1).flatten(2, 3)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1].to(keys.dtype)


def _mask(layout: PackedLayout, number: int, block: Block, rule: MaskRule | None, fold: int, like: Tensor) -> Tensor:
    """The block's mask as numbers to add, repeated for the query heads of a key head."""
    key = (None if rule is None else rule.key, number, fold, like.dtype)
    found = layout.masks.get(key)
    if found is None:
        seen = block.mask if rule is None else block.mask & rule.sees(block.places, block.seen)[:, None]
        hidden = ~seen.repeat(1, 1, fold, 1)
        found = torch.zeros(hidden.shape, dtype=like.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        layout.masks[key] = found
    return found


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | MaskRule | None,
    scaling: float | None = None,
    packed: PackedLayout | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function behind the name `steersman_packed`.

    Shapes: query [1, H, T, D]; key [1, KV, T, D]; value [1, KV, T, E]; returns [1, T, H, E].
    """
    if packed is None:
        raise ConfigError("a model in packed mode was called without a layout; use hidden_states()")
    if isinstance(attention_mask, Tensor):
        raise ConfigError(f"{type(module).__name__} makes its own attention masks, which do not fit a packed row")
    # Under autocast rotation leaves queries and keys in fp32, of which attention would round every padded copy.
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else value.dtype
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    split, fold = packed.prompt_tokens, q.shape[1] // k.shape[1]
    if softcap is None and s_aux is None and kernels_of(q) is not None:
        return _by_kernels(q.contiguous(), k.contiguous(), v.contiguous(), packed, attention_mask, scaling)[None], None
    how = _Scores(scaling, softcap, s_aux)
    (prompt_q,), (prompt_k,), (prompt_v,) = (_Pad.apply(states[:split], (packed.prompts,)) for states in (q, k, v))
    mask = _mask(packed, 0, packed.prompts, attention_mask, fold, q)
    out = _Unpad.apply((packed.prompts,), _attend(prompt_q, prompt_k, prompt_v, mask, how))
    if packed.responses:
        own = [_Pad.apply(states[split:], packed.responses) for states in (q, k, v)]
        answers = []
        for number, (block, own_q, own_k, own_v) in enumerate(zip(packed.responses, *own, strict=True), start=1):
            group = packed.group[block.rows]
            keys, values = torch.cat([prompt_k[group], own_k], 1), torch.cat([prompt_v[group], own_v], 1)
            mask = _mask(packed, number, block, attention_mask, fold, q)
            answers.append(_attend(own_q, keys, values, mask, how))
        out = torch.cat([out, _Unpad.apply(packed.responses, *answers)])
    return out[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, mask_rule)
