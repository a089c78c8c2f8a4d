"""Supervised fine-tuning: the loss on what the assistant says, the token that ends its turn included.

    L = - sum_t m_t log p(x_t | x_<t) / sum_t m_t,   m_t = 1 on assistant tokens of every turn

TRL's SFTTrainer computes it, of an encoder-decoder `text_to_text`. The labels are made here (see
`steersman.nn.tokens`), because most published chat templates carry no `{% generation %}` marks, and so that an answer
is trained behind exactly the prompt tokens that it is generated behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from steersman.config.manifest import SftStage
from steersman.data.records import Demonstration, at, numbered_rows, plain_messages
from steersman.nn.encoder_decoder import is_encoder_decoder
from steersman.nn.tokens import LabelledTokens, label_conversation
from training.context import StageContext
from training.offline.text_to_text import text_to_text_trainer
from training.offline.trl_setup import (
    Progress,
    Start,
    check_length,
    finish_causal,
    options,
    start_causal,
    train,
)


def run_sft(spec: SftStage, ctx: StageContext, generated: Sequence[LabelledTokens] | None = None) -> dict[str, Path]:
    """Trains on `data.demonstrations` from the newest policy and returns the folders `model` and `adapter`.

    Args:
        generated: trained instead of the demonstrations: what a model generated, as the tokens that it generated.

    Raises:
        DataError: a row is wrong or too long; the message begins with `file:line`.
    """
    start = start_causal(ctx.policy_model, spec, ctx)

    def load(path: Path) -> Dataset:
        return labelled_dataset(path, start.tokenizer, start.stop_ids, spec.max_length)

    validation = None
    if generated is not None:
        data = _dataset(generated)
    else:
        files = ctx.files("demonstrations")
        data = load(files.train)
        validation = load(files.validation) if files.validation else None
    make = text_to_text_trainer if is_encoder_decoder(start.model.config) else _decoder_trainer
    trainer = make(start, options(spec, ctx), data, validation)
    trainer.add_callback(Progress(ctx))
    train(trainer, spec, ctx)
    del trainer
    return finish_causal(start, spec, ctx)


def _decoder_trainer(start: Start, arguments: dict[str, Any], data: Dataset, validation: Dataset | None) -> Trainer:
    return SFTTrainer(
        model=start.model,
        args=SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=data,
        eval_dataset=validation,
        processing_class=start.tokenizer,
    )


def labelled_dataset(path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], max_length: int) -> Dataset:
    """Rows `input_ids` and `labels` (-100 where nothing is learned) of a file of demonstrations."""
    rows = []
    for where, row in numbered_rows(path, Demonstration):
        with at(where):
            examples = label_conversation(tokenizer, plain_messages(row.messages), stop_ids, row.tools)
        for example in examples:
            check_length(len(example.token_ids), max_length, where)
        rows += examples
    return _dataset(rows)


def _dataset(rows: Sequence[LabelledTokens]) -> Dataset:
    return Dataset.from_list([{"input_ids": row.token_ids, "labels": row.labels} for row in rows])
