"""Forward passes without padding, with the prompt shared by all its responses.

A batch of groups (one prompt, its responses) becomes one row of tokens:

    [prompt 0][prompt 1]...[prompt G-1][response 0][response 1]...[response N-1]

Prompt tokens attend causally to their own prompt; response tokens attend to their prompt and
causally to themselves. Every linear layer sees each token once: G prompts instead of N, and no
padding. Only attention, which is cheap at these lengths, works on padded blocks. The result equals
the padded forward of each whole sequence, gradients included.

Attention itself is in `packed_attention.py`, and which models can be packed is decided by `parity.py`, which computes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from steersman.errors import InvalidArgumentError

PACKED_ATTENTION = "steersman_packed"
_SIMILAR = 0.6
"""Share of a block's longest response that the others must have."""


@dataclass(frozen=True, slots=True)
class Block:
    """The prompts, or responses of similar length, as a padded block inside attention.

    Shapes: `rows` [B] int64, which segments; `index` [B, L] int64, position of the token in the range of all prompts or
    all responses, 0 where padded; `tokens` [S] int64, these positions without padding; `inverse` [S] int64, position of
    every token in the flattened block; `padding` [B, L] bool; `mask` [B, 1, L, K] bool, which keys a query sees where
    it sees everything before it; `places` [B, L] and `seen` [B, K] int64, positions of queries and keys in their own
    sequence.
    """

    rows: Tensor
    index: Tensor
    tokens: Tensor
    inverse: Tensor
    padding: Tensor
    mask: Tensor
    places: Tensor
    seen: Tensor


@dataclass(frozen=True, slots=True)
class Table:
    """A block as rows of the packed row, -1 where padded, for kernels that gather and scatter.

    Shapes: `own` [B, L] int64, the block's tokens; `keys` [B, K] int64, what they see: their prompt and themselves;
    `first`, `last` [G] int64, the prompt's sequences in the block.
    """

    own: Tensor
    keys: Tensor
    first: Tensor
    last: Tensor


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
    masks: dict[Hashable, Tensor] = field(default_factory=dict)
    """Masks as the kernels want them, by rule, block, repetition and dtype: made once, used by every layer."""
    tables: list[Table] = field(default_factory=list)
    """Of the prompts and of every block of responses, made as the masks are."""


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
        mask, places, seen = own.copy(), column, column
    else:
        prompt = np.arange(int(prompt_lengths.max()))
        real_prompt = prompt < context[rows, None]
        mask = np.concatenate([np.broadcast_to(real_prompt[:, None], (len(rows), width, len(prompt))), own], axis=2)
        places = context[rows, None] + column
        seen = np.concatenate([np.broadcast_to(prompt, (len(rows), len(prompt))), places], axis=1)
    return Block(
        rows=torch.from_numpy(rows),
        index=torch.from_numpy(index),
        tokens=torch.from_numpy(index[real]),
        inverse=torch.from_numpy(np.flatnonzero(real)),
        padding=torch.from_numpy(~real),
        mask=torch.from_numpy(np.ascontiguousarray(mask))[:, None],
        places=torch.from_numpy(np.broadcast_to(places, (len(rows), width)).copy()),
        seen=torch.from_numpy(np.broadcast_to(seen, (len(rows), mask.shape[2])).copy()),
    )


def tables_of(layout: PackedLayout) -> list[Table]:
    """See `PackedLayout.tables`."""
    if not layout.tables:
        none = layout.group.new_empty(0)
        prompts = layout.prompts.index.masked_fill(layout.prompts.padding, -1)
        groups = torch.arange(len(prompts), device=prompts.device)
        layout.tables.append(Table(prompts, prompts, none, none))
        for block in layout.responses:
            own = (block.index + layout.prompt_tokens).masked_fill(block.padding, -1)
            group = layout.group[block.rows]
            first, last = torch.searchsorted(group, groups), torch.searchsorted(group, groups, right=True)
            layout.tables.append(Table(own, torch.cat([prompts[group], own], 1), first, last))
    return layout.tables


def _to(block: Block, device: torch.device | str) -> Block:
    return Block(*(getattr(block, name).to(device) for name in Block.__slots__))


def rows_of(batch: PackedBatch) -> tuple[list[Tensor], list[int], list[int]]:
    """Whole sequences int64 [L] of the N responses, and of prompts without one; their prompts' lengths and numbers."""
    layout = batch.layout
    lengths = (~layout.prompts.padding).sum(1).tolist()
    prompts = batch.token_ids[: layout.prompt_tokens].split(lengths)
    answers = batch.token_ids[layout.prompt_tokens :].split(batch.lengths.tolist())
    groups = layout.group.tolist()
    rows = [torch.cat([prompts[group], answer]) for group, answer in zip(groups, answers, strict=True)]
    alone = sorted(set(range(len(prompts))).difference(groups))
    groups += alone
    rows += [prompts[group] for group in alone]
    return rows, [lengths[group] for group in groups], groups


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
