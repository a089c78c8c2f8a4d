"""Padded batches in, padded hidden states out, and no work for padding or repeated beginnings in between.

TRL's trainers hand a decoder right-padded rows. With `skip_padding` its trunk packs the real tokens of a batch into one
row (see `packed.py`), runs a beginning that rows have in common once, and puts the hidden states back where the caller
expects them. Losses and gradients are those of the padded forward pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from steersman.errors import InvalidArgumentError
from steersman.nn.packed import enable_packed, pack


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


@dataclass(frozen=True, slots=True)
class Group:
    """Rows with a common beginning."""

    rows: list[int]
    """Their numbers in the batch."""
    prompt: np.ndarray
    """What all of them begin with; the whole row where there is only one."""
    rests: list[np.ndarray]
    """What follows in each of them; empty where there is only one."""


def share_beginnings(rows: Sequence[np.ndarray]) -> list[Group]:
    """The grouping of rows by common beginnings that leaves the fewest tokens.

    In alphabetical order rows with much in common are neighbours; a run of n neighbours with a common beginning of c
    tokens saves (n - 1) c. Dynamic programming finds the best runs.
    """
    order = sorted(range(len(rows)), key=lambda row: rows[row].tolist())
    common = [_common_prefix(rows[one], rows[other]) for one, other in itertools.pairwise(order)]
    saved, start_of_last = [0], [0]
    for end in range(1, len(order) + 1):
        best, start, shared = saved[end - 1], end - 1, len(rows[order[end - 1]])
        for first in range(end - 2, -1, -1):
            shared = min(shared, common[first])
            if not shared:
                break
            if saved[first] + (end - 1 - first) * shared > best:
                best, start = saved[first] + (end - 1 - first) * shared, first
        saved.append(best)
        start_of_last.append(start)
    groups, end = [], len(order)
    while end:
        start = start_of_last[end]
        shared = min(common[start : end - 1], default=len(rows[order[start]]))
        members = order[start:end]
        rests = [rows[member][shared:] for member in members] if len(members) > 1 else []
        groups.append(Group(members, rows[members[0]][:shared], rests))
        end = start
    return groups


def _common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    width = min(len(one), len(other))
    same = one[:width] == other[:width]
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
