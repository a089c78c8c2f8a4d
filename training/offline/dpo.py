"""Direct preference optimization and its variants through TRL.

    d = log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)
    sigmoid  L = -log sigmoid(beta d)                                     Rafailov et al. 2023
    ipo      L = (d / tokens - 1 / (2 beta))^2, d averaged over tokens     Azar et al. 2023
    hinge    L = max(0, 1 - beta d)                                       SLiC, Zhao et al. 2023
    robust   sigmoid made unbiased for a known share of flipped labels    Chowdhury et al. 2024

Where people disagreed (`soft_label` s of a row), a pair counts s times as it stands and 1 - s times turned around.
TRL's DPOTrainer trains; `training.mathematics.preference_losses` is its loss with that. Tokens are made here, so that
an answer ends where a generated one ends.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from steersman.config.manifest import DpoStage
from steersman.data.records import Message, Preference, Prompt, at, numbered_rows, plain_messages
from steersman.errors import DataError
from steersman.nn.tokens import IGNORE, prompt_and_answer_ids
from training.context import StageContext
from training.mathematics.preference_losses import preference_loss
from training.offline.trl_setup import (
    check_length,
    for_trl,
    options,
    start_causal,
    train_against_reference,
)


def run_dpo(spec: DpoStage, ctx: StageContext) -> dict[str, Path]:
    """Trains on `data.preferences` from the newest policy, which is also the reference, and returns its folders.

    Raises:
        DataError: a row is wrong or too long; the message begins with `file:line`.
    """
    start = start_causal(ctx.policy_model, spec, ctx, decoder_for="dpo trains decoders")

    def load(path: Path) -> Dataset:
        return preference_dataset(path, start.tokenizer, start.stop_ids, spec.max_length)

    config = DPOConfig(
        **options(spec, ctx),
        **for_trl(spec),
        loss_type=[spec.loss],
        beta=spec.beta,
        label_smoothing=spec.label_smoothing,
    )
    make = functools.partial(PreferenceTrainer, spec=spec, args=config)
    ties_only = lambda rows: set(rows["soft_label"]) == {0.5}  # noqa: E731
    return train_against_reference(start, spec, ctx, ctx.files("preferences"), load, make, may_stay=ties_only)


class PreferenceTrainer(DPOTrainer):
    """TRL's trainer with a loss that knows soft labels; rows hold token ids already."""

    def __init__(self, *, spec: DpoStage, processing_class: PreTrainedTokenizerBase, **options: Any) -> None:
        pad_id = processing_class.pad_token_id
        assert isinstance(pad_id, int)
        collate = functools.partial(_collate, DataCollatorForPreference(pad_token_id=pad_id))
        super().__init__(processing_class=processing_class, data_collator=collate, **options)
        self._spec = spec

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        soft_label = inputs.pop("soft_label")
        mode = "train" if model.training else "eval"
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, IGNORE)
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
            **options,
        )
        logps = outputs.log_probs.sum(1)
        reference = torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, inputs))
        chosen, rejected = (logps - reference).chunk(2)
        spec = self._spec
        terms = preference_loss(
            spec.loss,
            chosen,
            rejected,
            beta=spec.beta,
            smoothing=spec.label_smoothing,
            lengths=tuple(mask.sum(1).chunk(2)),
            soft_label=soft_label,
        )
        loss = terms.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._count(mode, inputs["attention_mask"], spec.beta * chosen.detach(), spec.beta * rejected.detach())
        return (loss, outputs) if return_outputs else loss

    def _count(self, mode: str, attention_mask: Tensor, chosen: Tensor, rejected: Tensor) -> None:
        """Metrics by TRL's names, over all ranks."""
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.gather(attention_mask.sum()).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = self.accelerator.gather(chosen), self.accelerator.gather(rejected)
        for name, values in (
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/margins", chosen - rejected),
            ("rewards/accuracies", (chosen > rejected).float()),
        ):
            self._metrics[mode][name].append(values.mean().item())


def _collate(collator: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    soft = torch.tensor([row["soft_label"] for row in rows], dtype=torch.float32)
    return {**collator(rows), "soft_label": soft}


def preference_dataset(path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], max_length: int) -> Dataset:
    """Rows `prompt_ids`, `chosen_ids`, `rejected_ids` and `soft_label` of a file of preferences."""
    rows = []
    for where, row in numbered_rows(path, Preference):
        prompt, chosen = prompt_and_answer(tokenizer, row, row.chosen, stop_ids, where)
        other, rejected = prompt_and_answer(tokenizer, row, row.rejected, stop_ids, where)
        assert prompt == other, "a prompt's tokens do not depend on the answer"
        check_length(len(prompt) + max(len(chosen), len(rejected)), max_length, where)
        soft_label = 1.0 if row.soft_label is None else row.soft_label
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "soft_label": soft_label})
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
