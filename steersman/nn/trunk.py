"""Padded batches in, padded hidden states out, and no work for padding or repeated beginnings in between.

TRL's trainers hand a decoder right-padded rows. With `skip_padding` its trunk packs the real tokens of a batch into one
row (see `packed.py`), runs a beginning that rows have in common once, and puts the hidden states back where the caller
expects them. Losses and gradients are those of the padded forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from steersman.errors import InvalidArgumentError
from steersman.nn.packed import enable_packed, pack

Row = Sequence[int] | np.ndarray


def trunk_of(model: nn.Module) -> nn.Module:
    """The transformer below the head of a causal LM or sequence classifier, PEFT-wrapped or not."""
    base = _unwrapped(model)
    return getattr(base, base.base_model_prefix)


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_decoder(model: nn.Module) -> bool:
    """True for a causal LM, or a classifier that reads the last token of one; False for encoders."""
    base = _unwrapped(model)
    return hasattr(base, "lm_head") or hasattr(base, "score")


def can_skip_padding(model: nn.Module) -> bool:
    """True for decoders whose attention can be replaced; encoders attend in both directions and stay padded."""
    return is_decoder(model) and bool(getattr(_unwrapped(model), "_supports_attention_backend", False))


def skip_padding(model: nn.Module) -> bool:
    """Makes the trunk skip padding, in place; returns whether the model can."""
    if not can_skip_padding(model):
        return False
    enable_packed(model)
    trunk = trunk_of(model)
    trunk.forward = functools.partial(_forward, trunk.forward)  # type: ignore[method-assign]
    return True


def _forward(
    packed_forward: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> BaseModelOutputWithPast:
    """input_ids and attention_mask [B, L], padded on the right; `last_hidden_state` [B, L, D], 0 where padded."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    lengths = mask.sum(1).tolist()
    if mask.dim() != 2 or not bool((mask[:, :-1] >= mask[:, 1:]).all()):
        raise InvalidArgumentError("skip_padding needs rows that are padded on the right, with a [batch, length] mask")
    ids = input_ids.cpu().numpy()
    groups = share_beginnings([row[:length] for row, length in zip(ids, lengths, strict=True)])
    batch = pack([(group.prompt, group.rests) for group in groups], device=input_ids.device)
    hidden = packed_forward(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        packed=batch.layout,
        **{name: value for name, value in kwargs.items() if name.startswith("output_") and value},
    ).last_hidden_state[0]
    index = torch.from_numpy(_where(groups, *ids.shape)).to(input_ids.device)
    # A padded cell reads token 0 and is then set to 0, so that no gradient comes from it.
    padded = hidden.index_select(0, index.clamp(min=0).flatten()).view(*index.shape, -1)
    return BaseModelOutputWithPast(last_hidden_state=padded.masked_fill((index < 0)[..., None], 0))


class Group:
    """Rows with a common beginning; `rests` is empty where a row stands alone."""

    def __init__(self, rows: list[int], tokens: list[np.ndarray]) -> None:
        self.rows = rows
        if len(rows) == 1:
            self.prompt, self.rests = tokens[0], []
        else:
            shared = _common_prefix(tokens)
            self.prompt, self.rests = tokens[0][:shared], [row[shared:] for row in tokens]

    @property
    def size(self) -> int:
        return len(self.prompt) + sum(len(rest) for rest in self.rests)


def share_beginnings(rows: list[np.ndarray]) -> list[Group]:
    """The cheapest of three groupings: every row alone; row i with row i + B/2 (chosen and rejected); all together."""
    groupings = [[[row] for row in range(len(rows))]]
    half = len(rows) // 2
    if len(rows) > 2:
        groupings.append([list(range(len(rows)))])
    if len(rows) > 1 and len(rows) % 2 == 0:
        groupings.append([[row, row + half] for row in range(half)])
    usable = []
    for grouping in groupings:
        groups = [Group(members, [rows[member] for member in members]) for members in grouping]
        if all(len(group.prompt) for group in groups):
            usable.append(groups)
    return min(usable, key=lambda groups: sum(group.size for group in groups))


def _common_prefix(rows: list[np.ndarray]) -> int:
    width = min(map(len, rows))
    same = np.ones(width, dtype=bool)
    for row in rows[1:]:
        same &= row[:width] == rows[0][:width]
    return width if same.all() else int(same.argmin())


def _where(groups: list[Group], rows: int, width: int) -> np.ndarray:
    """int64 [rows, width]: position of every token in the packed row, -1 where padded."""
    index = np.full((rows, width), -1, dtype=np.int64)
    start, end = 0, sum(len(group.prompt) for group in groups)
    for group in groups:
        shared = len(group.prompt)
        for row, rest in zip(group.rows, group.rests or [np.empty(0, np.int64)], strict=True):
            index[row, :shared] = np.arange(start, start + shared)
            index[row, shared : shared + len(rest)] = np.arange(end, end + len(rest))
            end += len(rest)
        start += shared
    return index
