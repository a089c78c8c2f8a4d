"""The one batch type of reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from training.mathematics import segments


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """N samples of G prompts; the samples of a prompt follow one another.

    Per-token tensors are fp32 [T] with T = lengths.sum(): entry t belongs to the t-th response token
    over all samples, and is about that token (its log-probability, its reward), never about the
    next. There are no masks: an empty response has length 0 and no entries.
    """

    prompts: tuple[np.ndarray, ...]
    """G arrays of int32 token ids."""
    responses: tuple[np.ndarray, ...]
    """N arrays of int32 token ids, the end-of-sequence token included."""
    group: Tensor
    """int64 [N], index of the prompt."""
    lengths: Tensor
    """int64 [N]"""
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

    def select(self, keep: Tensor) -> SampleBatch:
        """The samples where `keep` (bool [N]) holds. Prompts stay, also those without samples."""
        return replace(
            self,
            responses=tuple(response for response, kept in zip(self.responses, keep.tolist(), strict=True) if kept),
            group=self.group[keep],
            lengths=self.lengths[keep],
            engine_logprobs=segments.select(self.engine_logprobs, self.lengths, keep),
            ref_logprobs=segments.select(self.ref_logprobs, self.lengths, keep),
            scores=self.scores[keep],
            parts={name: values[keep] for name, values in self.parts.items()},
            ended=self.ended[keep],
            versions=self.versions[keep],
        )

    def __len__(self) -> int:
        return len(self.responses)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward pass takes: samples of some prompts, and where their tokens lie in the batch."""

    groups: list[tuple[np.ndarray, list[np.ndarray]]]
    samples: Tensor
    """int64 [n], indices of the samples in the batch."""
    tokens: Tensor
    """int64 [t], indices of their tokens in the batch's per-token tensors."""

    @property
    def size(self) -> int:
        """Tokens of the forward pass."""
        return sum(len(prompt) + sum(map(len, responses)) for prompt, responses in self.groups)


def micro_batches(batch: SampleBatch, group_ids: list[int], budget: int) -> list[MicroBatch]:
    """Splits the samples of some prompts by token budget, long prompts' samples first.

    A prompt whose samples do not fit the budget together is repeated; a single sample above the
    budget runs alone. The split changes memory and speed, never the result.
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
            if chunk and size + length > budget:
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
    tokens = [torch.arange(len(batch.responses[sample])) + offsets[sample] for sample in samples]
    return MicroBatch(
        groups=[(batch.prompts[group], [batch.responses[sample] for sample in members]) for group, members in chunks],
        samples=torch.tensor(samples, dtype=torch.int64),
        tokens=torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int64),
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
