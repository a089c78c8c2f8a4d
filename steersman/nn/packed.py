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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from steersman.errors import ConfigError, InvalidArgumentError

PACKED_ATTENTION = "steersman_packed"


@dataclass(frozen=True, slots=True)
class Block:
    """One kind of segment (prompts or responses) as a padded block inside attention.

    Shapes: `index` [B, L] int64, position of the token in the segment range, 0 where padded;
    `inverse` [S] int64, position of every token in the flattened block; `padding` [B, L] bool;
    `mask` [B, 1, L, K] bool, which keys a query sees.
    """

    index: Tensor
    inverse: Tensor
    padding: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Who attends to whom; the same for every layer."""

    prompt_tokens: int
    prompts: Block
    responses: Block | None
    group: Tensor
    """int64 [N], the prompt of every response."""
    longest: int


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
    prompt_block = _block(prompt_lengths, None, prompt_lengths)
    response_block = _block(lengths, prompt_lengths[group], prompt_lengths) if lengths.sum() else None
    longest = int(max(prompt_lengths.max(), (prompt_lengths[group] + lengths).max(initial=0)))
    return PackedBatch(
        token_ids=tensor(token_ids),
        position_ids=tensor(positions),
        layout=PackedLayout(
            prompt_tokens=int(prompt_ends[-1]),
            prompts=_to(prompt_block, device),
            responses=_to(response_block, device) if response_block is not None else None,
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


def _block(lengths: np.ndarray, context: np.ndarray | None, prompt_lengths: np.ndarray) -> Block:
    """Padded block of segments; `context` [B] is how many prompt keys each segment sees before its own."""
    width = int(lengths.max())
    column = np.arange(width)
    real = column < lengths[:, None]
    index = np.where(real, (np.cumsum(lengths) - lengths)[:, None] + column, 0)
    inverse = np.flatnonzero(real)
    own = np.broadcast_to(column[:, None] >= column, (len(lengths), width, width))
    if context is None:
        mask = own.copy()
    else:
        seen = np.arange(int(prompt_lengths.max())) < context[:, None]
        mask = np.concatenate([np.broadcast_to(seen[:, None], (len(lengths), width, seen.shape[1])), own], axis=2)
    return Block(
        index=torch.from_numpy(index),
        inverse=torch.from_numpy(inverse),
        padding=torch.from_numpy(~real),
        mask=torch.from_numpy(np.ascontiguousarray(mask))[:, None],
    )


def _to(block: Block, device: torch.device | str) -> Block:
    return Block(*(getattr(block, name).to(device) for name in Block.__slots__))


class _Pad(torch.autograd.Function):
    """[S, ...] -> [B, L, ...] and back; both directions are plain gathers."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, index: Tensor, inverse: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return flat[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grads[0].flatten(0, 1)[inverse], None, None, None


class _Unpad(torch.autograd.Function):
    """[B, L, ...] -> [S, ...]: the inverse of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, index: Tensor, inverse: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(index, padding)
        return padded.flatten(0, 1)[inverse]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, padding = ctx.saved_tensors
        padded = grads[0][index]
        padded[padding] = 0
        return padded, None, None, None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Grouped-query attention with the query heads of one key head folded into rows.

    Shapes: query [B, L, H, D]; key and value [B, K, KV, D]; mask [B, 1, L, K]; returns [B, L, H, D].
    """
    batch, width, heads, dim = query.shape
    kv_heads = key.shape[2]
    fold = heads // kv_heads
    rows = query.view(batch, width, kv_heads, fold, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    out = F.scaled_dot_product_attention(
        rows, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask.repeat(1, 1, fold, 1), scale=scaling
    )
    return out.view(batch, kv_heads, fold, width, dim).permute(0, 3, 1, 2, 4).reshape(batch, width, heads, dim)


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
    split = packed.prompt_tokens
    block = packed.prompts
    index = (block.index, block.inverse, block.padding)
    prompt_k, prompt_v = _Pad.apply(k[:split], *index), _Pad.apply(v[:split], *index)
    out = _Unpad.apply(_attend(_Pad.apply(q[:split], *index), prompt_k, prompt_v, block.mask, scaling), *index)
    if packed.responses is not None:
        block = packed.responses
        index = (block.index, block.inverse, block.padding)
        own_q, own_k, own_v = (_Pad.apply(states[split:], *index) for states in (q, k, v))
        keys = torch.cat([prompt_k[packed.group], own_k], dim=1)
        values = torch.cat([prompt_v[packed.group], own_v], dim=1)
        answer = _attend(own_q, keys, values, block.mask, scaling)
        out = torch.cat([out, _Unpad.apply(answer, *index)])
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
