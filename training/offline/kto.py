"""Kahneman-Tversky optimization through TRL: thumbs up and thumbs down, no pairs needed (Ethayarajh et al. 2024).

    r = log pi(y|x) / ref(y|x),   z = KL estimate from mismatched prompts and answers of the batch
    thumbs up    L = w_up (1 - sigmoid(beta (r - z)))
    thumbs down  L = w_down (1 - sigmoid(beta (z - r)))

TRL's KTOTrainer computes the loss. z needs batches of a fixed composition, so the rows are shuffled once, by the seed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import KTOConfig, KTOTrainer

from steersman.config.manifest import KtoStage
from steersman.data.records import Feedback, numbered_rows
from steersman.errors import ConfigError, DataError
from training.context import StageContext
from training.offline.dpo import prompt_and_answer
from training.offline.trl_setup import (
    check_length,
    for_trl,
    options,
    start_causal,
    train_against_reference,
)


def run_kto(spec: KtoStage, ctx: StageContext) -> dict[str, Path]:
    """Trains on `data.feedback` from the newest policy, which is also the reference, and returns its folders.

    Raises:
        ConfigError: micro-batches of one row, from which no KL can be estimated.
        DataError: a row is wrong or too long, or all thumbs point the same way.
    """
    arguments = options(spec, ctx)
    micro = arguments["per_device_train_batch_size"]
    if micro < 2:
        raise ConfigError("kto.microBatchSize must be at least 2: the KL is estimated from mismatched rows of it")
    start = start_causal(ctx.policy_model, spec, ctx, decoder_for="kto trains decoders")

    def load(path: Path) -> Dataset:
        return feedback_dataset(path, start.tokenizer, start.stop_ids, spec.max_length, micro, ctx.seed)

    config = KTOConfig(
        **arguments,
        **for_trl(spec),
        beta=spec.beta,
        desirable_weight=spec.desirable_weight,
        undesirable_weight=spec.undesirable_weight,
    )
    make = functools.partial(_Trainer, args=config)
    return train_against_reference(start, spec, ctx, ctx.files("feedback"), load, make)


class _Trainer(KTOTrainer):
    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows hold token ids already."""
        return dataset


def feedback_dataset(
    path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], max_length: int, micro: int, seed: int
) -> Dataset:
    """Rows `prompt_ids`, `completion_ids`, `KL_completion_ids` and `label`, shuffled by `seed`.

    `KL_completion_ids` is the answer of the row before in the micro-batch, the first takes the last's.
    """
    rows = []
    for where, row in numbered_rows(path, Feedback):
        prompt, answer = prompt_and_answer(tokenizer, row, row.completion, stop_ids, where)
        check_length(len(prompt) + len(answer), max_length, where)
        rows.append({"prompt_ids": prompt, "completion_ids": answer, "label": row.label})
    if len({row["label"] for row in rows}) < 2:
        raise DataError(f"{path.name}: every label is {rows[0]['label']}; KTO learns from thumbs up and thumbs down")

    def mismatch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        answers = batch["completion_ids"]
        return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

    return Dataset.from_list(rows).shuffle(seed=seed).map(mismatch, batched=True, batch_size=micro)
