"""Prompts and demonstrations from JSONL to token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from steersman.data import records
from steersman.data.records import at, plain_messages
from steersman.errors import DataError
from steersman.nn.tokens import prompt_and_answer_ids, prompt_ids
from training.online.rollout import Prompt


@dataclass(frozen=True)
class Limit:
    """Longest prompt that leaves room for an answer."""

    tokens: int
    """Of the prompt."""
    of: str
    """Whose limit it is."""
    mend: str


def load_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int, limits: Sequence[Limit] = ()
) -> list[Prompt]:
    """All prompts of a file.

    Args:
        max_tokens: longest prompt that leaves room for an answer in the policy's context.
        limits: what a prompt must keep within beside.

    Raises:
        DataError: a malformed row, or a prompt that is too long; file and line are named.
    """
    prompts = []
    for where, key, row in records.keyed_prompts(path):
        messages = plain_messages(row.prompt)
        with at(where):
            ids = np.asarray(prompt_ids(tokenizer, messages, row.tools), dtype=np.int32)
        for limit in (Limit(max_tokens, "the context", "or lower generation.maxNewTokens"), *limits):
            if len(ids) > limit.tokens:
                raise DataError(
                    f"{where}: the prompt has {len(ids)} tokens, {limit.of} leaves room for {max(0, limit.tokens)}; "
                    f"shorten it {limit.mend}"
                )
        prompts.append(Prompt(ids, messages, json.dumps(row.known()) if row.known() else "", key, row.tools))
    return prompts


def load_answers(
    path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ids, answer ids) of the last assistant turn of every demonstration, for PPO-ptx."""
    pairs = []
    for where, row in records.numbered_rows(path, records.Demonstration):
        messages = plain_messages(row.messages)
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        with at(where):
            prompt, answer = prompt_and_answer_ids(tokenizer, messages[:last], messages[last], stop_ids, row.tools)
        pairs.append((np.asarray(prompt, dtype=np.int32), np.asarray(answer, dtype=np.int32)))
    return pairs
