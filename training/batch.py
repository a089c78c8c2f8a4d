"""The one batch type of reinforcement learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.nn.packed import PackedBatch, pack
from training.mathematics import segments


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """N samples of G prompts; the samples of a prompt follow one another.

    A response is everything after the prompt: the policy's own tokens, and between them those that others wrote
    (results of tools, turns of the customer), for which `loss_mask` is False. Only the policy's own are learned from.
    Per-token tensors are fp32 [T] with T = lengths.sum(): entry t belongs to the t-th own token over all samples, and
    is about that token (its log-probability, its reward), never about the next. So a token without loss has no KL, no
    advantage and no value target, and the mathematics needs no masks; an empty response has length 0 and no entries.
    """

    prompts: tuple[np.ndarray, ...]
    """G arrays of int32 token ids."""
    responses: tuple[np.ndarray, ...]
    """N arrays of int32 token ids, the end-of-sequence token included."""
    loss_mask: tuple[np.ndarray, ...]
    """N arrays of bool, one a token of the response: the policy's own."""
    group: Tensor
    """int64 [N], index of the prompt."""
    lengths: Tensor
    """int64 [N], own tokens."""
    engine_logprobs: Tensor
    """fp32 [T], of the engine that sampled."""
    ref_logprobs: Tensor
    """fp32 [T], of the frozen reference."""
    scores: Tensor
    """fp32 [N], reward of the whole answer; NaN: missing."""
    parts: dict[str, Tensor]
    """fp32 [N] a scorer."""
    ended: Tensor
    """bool [N], ended by itself."""
    versions: Tensor
    """int64 [N], the oldest weights version that made a token."""
    standardised: Mapping[str, float] = field(default_factory=dict)
    """Weights of the `parts` that have mean 0 and standard deviation 1 on a reference set: those of reward models."""

    def select(self, keep: Tensor) -> SampleBatch:
        """The samples where `keep` (bool [N]) holds. Prompts stay, also those without samples."""
        kept = keep.nonzero()[:, 0].tolist()
        return replace(
            self,
            responses=tuple(self.responses[index] for index in kept),
            loss_mask=tuple(self.loss_mask[index] for index in kept),
            group=self.group[keep],
            lengths=self.lengths[keep],
            engine_logprobs=segments.select(self.engine_logprobs, self.lengths, keep),
            ref_logprobs=segments.select(self.ref_logprobs, self.lengths, keep),
            scores=self.scores[keep],
            parts={name: values[keep] for name, values in self.parts.items()},
            ended=self.ended[keep],
            versions=self.versions[keep],
        )

    def finite(self) -> Tensor:
        """bool [N]: samples all of whose log-probabilities are finite."""
        bad = ~(self.engine_logprobs.isfinite() & self.ref_logprobs.isfinite())
        return segments.segment_sum(bad.double(), self.lengths) == 0

    @staticmethod
    def joined(batches: Sequence[SampleBatch]) -> SampleBatch:
        """The samples of several batches of one step; of a scorer that said nothing in a batch its values are NaN."""
        if len(batches) == 1:
            return batches[0]
        offsets = np.cumsum([0, *(len(batch.prompts) for batch in batches)])
        names = dict.fromkeys(name for batch in batches for name in batch.parts)

        def part(name: str) -> Tensor:
            found = [batch.parts.get(name, torch.full_like(batch.scores, math.nan)) for batch in batches]
            return torch.cat(found)

        return SampleBatch(
            prompts=tuple(prompt for batch in batches for prompt in batch.prompts),
            responses=tuple(response for batch in batches for response in batch.responses),
            loss_mask=tuple(mask for batch in batches for mask in batch.loss_mask),
            group=torch.cat([batch.group + int(offset) for batch, offset in zip(batches, offsets, strict=False)]),
            parts={name: part(name) for name in names},
            standardised={name: weight for batch in batches for name, weight in batch.standardised.items()},
            **{name: torch.cat([getattr(batch, name) for batch in batches]) for name in _TENSORS},
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint: nothing but tensors, numbers and names."""
        tensors = {name: getattr(self, name) for name in (*_TENSORS, "group")}
        arrays = {name: [torch.tensor(array) for array in getattr(self, name)] for name in _ARRAYS}
        return tensors | arrays | {"parts": self.parts, "standardised": dict(self.standardised)}

    @staticmethod
    def of(state: dict[str, Any]) -> SampleBatch:
        """What `state` gave."""
        return SampleBatch(**{**state, **{name: tuple(array.numpy() for array in state[name]) for name in _ARRAYS}})

    def __len__(self) -> int:
        return len(self.responses)


_ARRAYS = ("prompts", "responses", "loss_mask")
_TENSORS = ("lengths", "engine_logprobs", "ref_logprobs", "scores", "ended", "versions")


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward pass takes: samples of some prompts, and where their tokens lie in the batch."""

    groups: list[tuple[np.ndarray, list[np.ndarray]]]
    samples: Tensor
    """int64 [n], indices of the samples in the batch."""
    tokens: Tensor
    """int64 [t], indices of their own tokens in the batch's per-token tensors."""
    own: Tensor
    """bool [R], which of all response tokens are the policy's own."""

    def packed(self, device: torch.device | str) -> PackedBatch:
        """What the model takes; it predicts the policy's own tokens only."""
        packed = pack(self.groups, device)
        own = self.own.to(device)
        return replace(packed, predictor=packed.predictor[own], targets=packed.targets[own])


def micro_batches(
    batch: SampleBatch, group_ids: list[int], budget: int, *, whole_groups: bool = False
) -> list[MicroBatch]:
    """Splits the samples of some prompts by token budget, long prompts' samples first.

    A prompt whose samples do not fit the budget together is repeated; a single sample above the
    budget runs alone. The split changes memory and speed, never the result.

    Args:
        whole_groups: samples of a prompt stay together also above the budget, because the loss compares them.
    """
    offsets = segments.starts(batch.lengths)
    members: dict[int, list[int]] = {index: [] for index in group_ids}
    for sample, group in enumerate(batch.group.tolist()):
        if group in members:
            members[group].append(sample)
    chunks: list[tuple[int, int, list[int]]] = []
    for group, samples in members.items():
        prompt = len(batch.prompts[group])
        size = prompt
        chunk: list[int] = []
        for sample in samples:
            length = len(batch.responses[sample])
            if chunk and size + length > budget and not whole_groups:
                chunks.append((size, group, chunk))
                size, chunk = prompt, []
            size += length
            chunk.append(sample)
        if chunk:
            chunks.append((size, group, chunk))
    chunks.sort(key=lambda item: (-item[0], item[1], item[2]))
    result: list[MicroBatch] = []
    current: list[tuple[int, list[int]]] = []
    total = 0
    for size, group, samples in chunks:
        if current and total + size > budget:
            result.append(_micro(batch, current, offsets))
            current, total = [], 0
        current.append((group, samples))
        total += size
    if current:
        result.append(_micro(batch, current, offsets))
    return result


def _micro(batch: SampleBatch, chunks: list[tuple[int, list[int]]], offsets: Tensor) -> MicroBatch:
    samples = [sample for _, members in chunks for sample in members]
    tokens = [torch.arange(int(batch.lengths[sample])) + offsets[sample] for sample in samples]
    own = [batch.loss_mask[sample] for sample in samples]
    return MicroBatch(
        groups=[(batch.prompts[group], [batch.responses[sample] for sample in members]) for group, members in chunks],
        samples=torch.tensor(samples, dtype=torch.int64),
        tokens=torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int64),
        own=torch.from_numpy(np.concatenate([np.zeros(0, bool), *own])),
    )


def token_chunks(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], budget: int
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Splits (prompt, answer) pairs in their order by token budget; a single pair above it stays alone."""
    chunks: list[list[tuple[np.ndarray, np.ndarray]]] = []
    total = 0
    for prompt, answer in pairs:
        size = len(prompt) + len(answer)
        if not chunks or total + size > budget:
            chunks.append([])
            total = 0
        chunks[-1].append((prompt, answer))
        total += size
    return chunks
