"""SFT of an encoder-decoder: the prompt goes to the encoder, the loss is on the answer, its end token included.

    L = - sum_t log p(y_t | y_<t, x) / number of answer tokens of the optimizer step

transformers' Trainer computes it; TRL's packs prompt and answer into one row, which an encoder-decoder has not.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from steersman.errors import DataError
from steersman.nn.encoder_decoder import collated
from steersman.nn.forward import unwrapped
from steersman.nn.tokens import IGNORE
from training.offline.trl_setup import Start


def text_to_text_trainer(start: Start, options: dict[str, Any], data: Dataset, validation: Dataset | None) -> Trainer:
    """
    Args:
        options: arguments of `TrainingArguments`.
        data, validation: rows `input_ids` and `labels` of whole conversations.

    Raises:
        DataError: something stands behind an answer in its row.
    """
    return Trainer(
        model=start.model,
        args=TrainingArguments(**options),
        data_collator=functools.partial(collated, model=unwrapped(start.model), ignore=IGNORE),
        train_dataset=data.map(_split),
        eval_dataset=None if validation is None else validation.map(_split),
        processing_class=start.tokenizer,
        compute_loss_func=answer_loss,
    )


def _split(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """Prompt and answer of a labelled row."""
    first = next((place for place, label in enumerate(row["labels"]) if label != IGNORE), len(row["labels"]))
    answer = row["labels"][first:]
    if not answer or IGNORE in answer:
        raise DataError(
            "an encoder-decoder learns one answer behind one prompt, but the chat template renders several answers in "
            "a row; remove it, and every answer gets a row"
        )
    return {"input_ids": row["input_ids"][:first], "labels": answer}


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens, over those of the whole optimizer step where it is known."""
    total = torch.nn.functional.cross_entropy(
        outputs.logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / ((labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)
