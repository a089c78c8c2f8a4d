"""Prompts and demonstrations from JSONL to token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from steersman.data import records
from steersman.data.records import at, plain_messages
from steersman.errors import DataError
from steersman.nn.tokens import prompt_and_answer_ids, prompt_ids
from training.online.rollout import Prompt


def load_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Prompt]:
    """All prompts of a file.

    Args:
        max_tokens: longest prompt that leaves room for an answer.

    Raises:
        DataError: a malformed row, or a prompt that is too long; file and line are named.
    """
    prompts = []
    for where, key, row in records.keyed_prompts(path):
        messages = plain_messages(row.prompt)
        with at(where):
            ids = np.asarray(prompt_ids(tokenizer, messages, row.tools), dtype=np.int32)
        if len(ids) > max_tokens:
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens, the context leaves room for {max_tokens}; "
                "shorten it or lower generation.maxNewTokens"
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
