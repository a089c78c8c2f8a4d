"""Forward passes without padding, with the prompt shared by all its responses.

A batch of groups (one prompt, its responses) becomes one row of tokens:

    [prompt 0][prompt 1]...[prompt G-1][response 0][response 1]...[response N-1]

Prompt tokens attend causally to their own prompt; response tokens attend to their prompt and
causally to themselves. Every linear layer sees each token once: G prompts instead of N, and no
padding. Only attention, which is cheap at these lengths, works on padded blocks. The result equals
the padded forward of each whole sequence, gradients included.

It works for every transformers model that uses the `AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from steersman.errors import ConfigError, InvalidArgumentError

PACKED_ATTENTION = "steersman_packed"
_SIMILAR = 0.6
"""Share of a block's longest response that the others must have."""


@dataclass(frozen=True, slots=True)
class Block:
    """The prompts, or responses of similar length, as a padded block inside attention.

    Shapes: `rows` [B] int64, which segments; `index` [B, L] int64, position of the token in the range of all prompts or
    all responses, 0 where padded; `tokens` [S] int64, these positions without padding; `inverse` [S] int64, position of
    every token in the flattened block; `padding` [B, L] bool; `mask` [B, 1, L, K] bool, which keys a query sees.
    """

    rows: Tensor
    index: Tensor
    tokens: Tensor
    inverse: Tensor
    padding: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Who attends to whom; the same for every layer."""

    prompt_tokens: int
    prompts: Block
    responses: tuple[Block, ...]
    """Longest first; padding every answer to the longest one would multiply the scores by two to four."""
    group: Tensor
    """int64 [N], the prompt of every response."""
    longest: int
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)
    """Masks as the kernels want them, by block, repetition and dtype: made once, used by every layer."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N responses of G prompts, ready for `hidden_states`.

    `predictor[i]` is where in the packed row the hidden state lies that predicts `targets[i]`; the
    R response tokens of all samples follow one another in the order of the samples.
    """

    token_ids: Tensor
    """int64 [T]"""
    position_ids: Tensor
    """int64 [T]"""
    layout: PackedLayout
    predictor: Tensor
    """int64 [R]"""
    targets: Tensor
    """int64 [R]"""
    lengths: Tensor
    """int64 [N], response lengths; 0 is allowed."""
    last: Tensor
    """int64 [N], the last token of each sequence: of its prompt where the response is empty."""


def pack(groups: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], device: torch.device | str = "cpu") -> PackedBatch:
    """Packs groups of (prompt ids [P], responses of ids [R_i]).

    Raises:
        InvalidArgumentError: an empty prompt, which leaves nothing to predict the first token from.
    """
    prompts = [np.asarray(prompt) for prompt, _ in groups]
    responses = [np.asarray(response) for _, members in groups for response in members]
    group = np.repeat(np.arange(len(groups)), [len(members) for _, members in groups])
    prompt_lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    lengths = np.array([len(response) for response in responses], dtype=np.int64)
    if not len(prompts) or not prompt_lengths.all():
        raise InvalidArgumentError("a prompt is empty; every sequence needs at least one prompt token")

    prompt_ends = np.cumsum(prompt_lengths)
    response_ends = prompt_ends[-1] + np.cumsum(lengths)
    starts = response_ends - lengths
    last_prompt = prompt_ends[group] - 1 if len(group) else np.zeros(0, np.int64)

    predictor = _ranges(starts - 1, lengths)
    first = (np.cumsum(lengths) - lengths)[lengths > 0]
    predictor[first] = last_prompt[lengths > 0]
    positions = np.concatenate(
        [_ranges(np.zeros(len(prompts), np.int64), prompt_lengths), _ranges(prompt_lengths[group], lengths)]
    )

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    token_ids = np.concatenate([*prompts, *responses]).astype(np.int64)
    prompt_block = _block(prompt_lengths, np.arange(len(prompts)), None, prompt_lengths)
    response_blocks = [_block(lengths, rows, prompt_lengths[group], prompt_lengths) for rows in _similar(lengths)]
    longest = int(max(prompt_lengths.max(), (prompt_lengths[group] + lengths).max(initial=0)))
    return PackedBatch(
        token_ids=tensor(token_ids),
        position_ids=tensor(positions),
        layout=PackedLayout(
            prompt_tokens=int(prompt_ends[-1]),
            prompts=_to(prompt_block, device),
            responses=tuple(_to(block, device) for block in response_blocks),
            group=tensor(group),
            longest=longest,
        ),
        predictor=tensor(predictor),
        targets=tensor(token_ids[prompt_ends[-1] :]),
        lengths=tensor(lengths),
        last=tensor(np.where(lengths > 0, response_ends - 1, last_prompt)),
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of [start, start + length) of every segment."""
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + offsets


def _similar(lengths: np.ndarray) -> list[np.ndarray]:
    """Segments with tokens in blocks of similar length, longest first."""
    order = np.argsort(-lengths, kind="stable")
    blocks: list[list[int]] = []
    for row in order[lengths[order] > 0].tolist():
        if not blocks or lengths[row] < _SIMILAR * lengths[blocks[-1][0]]:
            blocks.append([])
        blocks[-1].append(row)
    return [np.sort(block) for block in blocks]


def _block(lengths: np.ndarray, rows: np.ndarray, context: np.ndarray | None, prompt_lengths: np.ndarray) -> Block:
    """Padded block of the segments `rows`; `context` is how many prompt keys each segment sees before its own."""
    offsets, own_lengths = (np.cumsum(lengths) - lengths)[rows], lengths[rows]
    width = int(own_lengths.max())
    column = np.arange(width)
    real = column < own_lengths[:, None]
    index = np.where(real, offsets[:, None] + column, 0)
    own = np.broadcast_to(column[:, None] >= column, (len(rows), width, width))
    if context is None:
        mask = own.copy()
    else:
        seen = np.arange(int(prompt_lengths.max())) < context[rows, None]
        mask = np.concatenate([np.broadcast_to(seen[:, None], (len(rows), width, seen.shape[1])), own], axis=2)
    return Block(
        rows=torch.from_numpy(rows),
        index=torch.from_numpy(index),
        tokens=torch.from_numpy(index[real]),
        inverse=torch.from_numpy(np.flatnonzero(real)),
        padding=torch.from_numpy(~real),
        mask=torch.from_numpy(np.ascontiguousarray(mask))[:, None],
    )


def _to(block: Block, device: torch.device | str) -> Block:
    return Block(*(getattr(block, name).to(device) for name in Block.__slots__))


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


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Grouped-query attention with the query heads of one key head folded into rows.

    Shapes: query [B, L, H, D]; key and value [B, K, KV, D]; mask [B, 1, H / KV * L, K] to add; returns [B, L, H, D].
    """
    batch, width, heads, dim = query.shape
    kv_heads = key.shape[2]
    fold = heads // kv_heads
    rows = query.view(batch, width, kv_heads, fold, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    out = F.scaled_dot_product_attention(
        rows, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=scaling
    )
    return out.view(batch, kv_heads, fold, width, dim).permute(0, 3, 1, 2, 4).reshape(batch, width, heads, dim)


def _mask(layout: PackedLayout, number: int, block: Block, fold: int, dtype: torch.dtype) -> Tensor:
    """The block's mask as numbers to add, repeated for the query heads of a key head."""
    found = layout.masks.get((number, fold, dtype))
    if found is None:
        hidden = ~block.mask.repeat(1, 1, fold, 1)
        found = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        layout.masks[number, fold, dtype] = found
    return found


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function behind the name `steersman_packed`.

    Shapes: query [1, H, T, D]; key and value [1, KV, T, D]; returns [1, T, H, D].
    """
    if packed is None:
        raise ConfigError("a model in packed mode was called without a layout; use hidden_states()")
    window = kwargs.get("sliding_window")
    if window is not None and packed.longest > window:
        raise ConfigError(f"sequences of {packed.longest} tokens exceed the sliding window of {window}; shorten them")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ConfigError("models with attention soft-capping or attention sinks are not supported in packed mode")
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    split, fold = packed.prompt_tokens, q.shape[1] // k.shape[1]
    (prompt_q,), (prompt_k,), (prompt_v,) = (_Pad.apply(states[:split], (packed.prompts,)) for states in (q, k, v))
    mask = _mask(packed, 0, packed.prompts, fold, q.dtype)
    out = _Unpad.apply((packed.prompts,), _attend(prompt_q, prompt_k, prompt_v, mask, scaling))
    if packed.responses:
        own = [_Pad.apply(states[split:], packed.responses) for states in (q, k, v)]
        answers = []
        for number, (block, own_q, own_k, own_v) in enumerate(zip(packed.responses, *own, strict=True), start=1):
            group = packed.group[block.rows]
            keys, values = torch.cat([prompt_k[group], own_k], 1), torch.cat([prompt_v[group], own_v], 1)
            answers.append(_attend(own_q, keys, values, _mask(packed, number, block, fold, q.dtype), scaling))
        out = torch.cat([out, _Unpad.apply(packed.responses, *answers)])
    return out[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _unwrapped(model: Any) -> Any:
    """The transformers model below PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def enable_packed(model: nn.Module) -> None:
    """Switches a transformers model (PEFT-wrapped or not) to packed attention, in place."""
    base = _unwrapped(model)
    if not getattr(base, "_supports_attention_backend", False):
        raise ConfigError(f"{type(base).__name__} has no exchangeable attention; use a decoder such as Llama")
    base.set_attn_implementation(PACKED_ATTENTION)


def hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Last hidden states [T, hidden] of the trunk; the LM head is not run."""
    base = _unwrapped(model)
    trunk = getattr(base, base.base_model_prefix)
    output = trunk(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        packed=batch.layout,
    )
    return output.last_hidden_state[0]


def group_rows(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> tuple[list[tuple[np.ndarray, list[np.ndarray]]], list[int]]:
    """Groups rows with equal prompts for `pack`.

    Returns:
        The groups, and for every packed response the index of its row.
    """
    members: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(prompt.tobytes(), []).append(row)
    groups = [(prompts[rows[0]], [responses[row] for row in rows]) for rows in members.values()]
    return groups, [row for rows in members.values() for row in rows]
