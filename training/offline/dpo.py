"""Direct preference optimization and its variants through TRL.

    d = log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)
    sigmoid  L = -log sigmoid(beta d)                                     Rafailov et al. 2023
    ipo      L = (d / tokens - 1 / (2 beta))^2, d averaged over tokens     Azar et al. 2023
    hinge    L = max(0, 1 - beta d)                                       SLiC, Zhao et al. 2023
    robust   sigmoid made unbiased for a known share of flipped labels    Chowdhury et al. 2024

TRL's DPOTrainer computes the losses. Tokens are made here, so that an answer ends where a generated one ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from steersman.config.manifest import DpoStage
from steersman.data.records import Message, Preference, Prompt, at, numbered_rows, plain_messages
from steersman.errors import DataError
from steersman.nn.tokens import prompt_and_answer_ids
from training.context import StageContext
from training.offline.trl_setup import (
    Progress,
    check_length,
    finish_causal,
    options,
    reference_of,
    start_causal,
    train,
)


def run_dpo(spec: DpoStage, ctx: StageContext) -> dict[str, Path]:
    """Trains on `data.preferences` from the newest policy, which is also the reference, and returns its folders.

    Raises:
        DataError: a row is wrong or too long; the message begins with `file:line`.
    """
    files = ctx.files("preferences")
    start = start_causal(ctx.policy_model, spec, ctx)
    reference = reference_of(start, spec, ctx)
    trainer = _Trainer(
        model=start.model,
        ref_model=reference,
        args=DPOConfig(
            **options(spec, ctx),
            loss_type=[spec.loss],
            beta=spec.beta,
            label_smoothing=spec.label_smoothing,
            max_length=None,
            disable_dropout=not (spec.lora and spec.lora.dropout),
        ),
        train_dataset=preference_dataset(files.train, start.tokenizer, start.stop_ids, spec.max_length),
        eval_dataset=(
            preference_dataset(files.validation, start.tokenizer, start.stop_ids, spec.max_length)
            if files.validation
            else None
        ),
        processing_class=start.tokenizer,
        callbacks=[Progress(ctx)],
    )
    train(trainer, spec, ctx)
    del trainer, reference
    return finish_causal(start, spec, ctx)


class _Trainer(DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows hold token ids already."""
        return dataset


def preference_dataset(path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], max_length: int) -> Dataset:
    """Rows `prompt_ids`, `chosen_ids` and `rejected_ids` of a file of preferences."""
    rows = []
    for where, row in numbered_rows(path, Preference):
        prompt, chosen = prompt_and_answer(tokenizer, row, row.chosen, stop_ids, where)
        other, rejected = prompt_and_answer(tokenizer, row, row.rejected, stop_ids, where)
        assert prompt == other, "a prompt's tokens do not depend on the answer"
        check_length(len(prompt) + max(len(chosen), len(rejected)), max_length, where)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(rows)


def prompt_and_answer(
    tokenizer: PreTrainedTokenizerBase, row: Prompt, answer: Sequence[Message], stop_ids: list[int], where: str
) -> tuple[list[int], list[int]]:
    """Token ids of a row's prompt and of an answer to it, end token included."""
    if len(answer) > 1:
        raise DataError(f"{where}: an answer of {len(answer)} turns; move all but the last to the prompt")
    *prompt, said = plain_messages((*row.prompt, *answer))
    with at(where):
        return prompt_and_answer_ids(tokenizer, prompt, said, stop_ids, row.tools)
