"""Conversations with their returns as tokens: what was said before, what the policy did, and what it was worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from steersman.config.manifest import IlqlStage
from steersman.data.aspects import Rule
from steersman.data.records import Return, at, numbered_rows, plain_messages
from steersman.data.returns import SOURCES, check_they_differ, returns_of
from steersman.errors import DataError
from steersman.nn.packed import PackedBatch, group_rows, pack
from steersman.nn.tokens import IGNORE, label_conversation, prompt_and_answer_ids, prompt_ids
from training.context import StageContext
from training.offline.trl_setup import check_length


@dataclass(frozen=True, eq=False)
class Conversation:
    prompt: np.ndarray
    """int32 [P], everything before the first action."""
    rest: np.ndarray
    """int32 [R], the policy's own tokens and what others said in between."""
    own: np.ndarray
    """bool [R], the policy's own: T of them."""
    rewards: np.ndarray
    """float32 [T], at the last token of the turn that was rewarded."""


def conversation_tokens(
    row: Return, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], where: str
) -> Conversation:
    """A row in tokens.

    Raises:
        DataError: the template renders earlier turns otherwise than the last, so that several are no one row of tokens.
    """
    before = plain_messages(row.prompt)
    if len(row.completion) == 1:
        (answer,) = plain_messages(row.completion)
        prompt, rest = prompt_and_answer_ids(tokenizer, before, answer, stop_ids, row.tools)
        labels = rest
    else:
        prompt = prompt_ids(tokenizer, before, row.tools)
        found = label_conversation(tokenizer, plain_messages((*row.prompt, *row.completion)), stop_ids, row.tools)[-1]
        rest, labels = found.token_ids[len(prompt) :], found.labels[len(prompt) :]
        if found.token_ids[: len(prompt)] != prompt:
            rest = labels = []
    own = np.array(labels) != IGNORE
    ends = np.flatnonzero(own & ~np.append(own[1:], False))
    rewards = row.rewards()
    if len(ends) != len(rewards):
        raise DataError(
            f"{where}: completion: the chat template renders earlier assistant turns otherwise than the last one; give "
            "each turn a row of its own"
        )
    at_ends = np.zeros(len(rest), np.float32)
    at_ends[ends] = rewards
    return Conversation(np.array(prompt, np.int32), np.array(rest, np.int32), own, at_ends[own])


def conversations_of(
    spec: IlqlStage, context: StageContext, split: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> list[Conversation]:
    """All conversations of a split of the files that the stage learns from.

    Raises:
        DataError: a wrong or too long row, or returns that are all the same (training rows only).
    """
    paths: list[tuple[str, Path]] = []
    for source in spec.learn_from:
        path = getattr(context.files(source), split)
        if path is not None:
            paths.append((source, path))
    found: list[Conversation] = []
    rewards: list[float] = []
    for kind, path in paths:
        for where, row in numbered_rows(path, SOURCES[kind]):
            with at(where):
                returns = list(returns_of(row, Rule(spec.aspects)))
            for one in returns:
                with at(where):
                    tokens = conversation_tokens(one, tokenizer, stop_ids, where)
                check_length(len(tokens.prompt) + len(tokens.rest), spec.max_length, where)
                found.append(tokens)
                rewards += one.rewards()
    if split == "train":
        check_they_differ(rewards, ", ".join(path.name for _, path in paths))
    return found


def epoch_order(rows: Sequence[Conversation], seed: int) -> list[int]:
    """Rows in the order of an epoch: prompts shuffled, rows of one prompt beside each other, so that it runs once."""
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.prompt.tobytes(), []).append(index)
    members = list(groups.values())
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    return [row for group in order for row in members[group]]


@dataclass(frozen=True, eq=False)
class Part:
    """What one forward pass takes; it predicts the actions only."""

    packed: PackedBatch
    rewards: Tensor
    """float32 [T]"""
    lengths: Tensor
    """int64 [N], actions of each conversation."""


def part_of(rows: Sequence[Conversation], device: str) -> Part:
    """Rows without padding, equal prompts once."""
    groups, order = group_rows([row.prompt for row in rows], [row.rest for row in rows])
    packed = pack(groups, device)
    placed = [rows[index] for index in order]
    own = torch.from_numpy(np.concatenate([row.own for row in placed])).to(device)
    return Part(
        packed=replace(packed, predictor=packed.predictor[own], targets=packed.targets[own]),
        rewards=torch.from_numpy(np.concatenate([row.rewards for row in placed])).to(device),
        lengths=torch.tensor([int(row.own.sum()) for row in placed], device=device),
    )


def parts(rows: Sequence[Conversation], size: int) -> Iterator[list[Conversation]]:
    """Micro-batches of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
