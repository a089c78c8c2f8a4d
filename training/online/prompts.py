"""Prompts and demonstrations from JSONL to token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from steersman.data import records
from steersman.errors import DataError
from steersman.nn.tokens import answer_ids, prompt_ids
from training.online.rollout import Prompt


def plain_messages(messages: Sequence[records.Message]) -> list[dict[str, Any]]:
    """As chat templates take them."""
    return [message.model_dump(exclude_none=True) for message in messages]


def load_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Prompt]:
    """All prompts of a file.

    Args:
        max_tokens: longest prompt that leaves room for an answer.

    Raises:
        DataError: a malformed row, or a prompt that is too long; file and line are named.
    """
    prompts = []
    for line, row in enumerate(records.read_jsonl(path, records.Prompt), start=1):
        messages = plain_messages(row.prompt)
        ids = np.asarray(prompt_ids(tokenizer, messages), dtype=np.int32)
        if len(ids) > max_tokens:
            raise DataError(
                f"{path}:{line}: the prompt has {len(ids)} tokens, the context leaves room for {max_tokens}; "
                "shorten it or lower generation.maxNewTokens"
            )
        prompts.append(Prompt(ids, messages, json.dumps(row.facts) if row.facts else "", row.id or str(line)))
    if not prompts:
        raise DataError(f"{path}: there are no rows; at least one prompt is needed")
    return prompts


def load_answers(
    path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ids, answer ids) of the last assistant turn of every demonstration, for PPO-ptx."""
    pairs = []
    for row in records.read_jsonl(path, records.Demonstration):
        messages = plain_messages(row.messages)
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        prompt = prompt_ids(tokenizer, messages[:last])
        answer = answer_ids(tokenizer, messages[:last], messages[last], stop_ids)
        pairs.append((np.asarray(prompt, dtype=np.int32), np.asarray(answer, dtype=np.int32)))
    return pairs
