"""Reward models: pairwise ranking, preferred / not preferred, or ratings of several aspects.

    pairwise  L = -log sigmoid(r(x, chosen) - r(x, rejected) - margin) + c (r(x, chosen) + r(x, rejected))^2
    binary    L = -log sigmoid(+r) for preferred answers, -log sigmoid(-r) for the others
    aspects   L = sum_a (output_a - (rating_a - mean_a) / std_a)^2 over the ratings that exist

TRL's RewardTrainer trains the first (margin: Llama 2, equation 2; c: Eisenstein et al. 2023), the others a small
transformers Trainer; the losses are those of `training.mathematics.reward_losses`. Where people disagreed (`soft_label`
s of a row), a pair counts s times as it stands and 1 - s times turned around. A decoder's score is read at the token
that ends the answer. In the end every member is a plain folder, its mean and spread on a reference set stand in
`reward.json`, and what it is worth on held-out comparisons in `evaluation.json`.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from steersman.artifacts import atomic_dir
from steersman.config.manifest import RewardModelStage
from steersman.data.records import Aspects, Preference, Prompt, numbered_rows
from steersman.errors import ConfigError
from steersman.nn.dropout import disable_dropout
from steersman.nn.forward import is_decoder
from steersman.nn.load import load_classifier, load_reward_model, load_tokenizer, quiet_libraries
from steersman.nn.lora import merge_to_folder, quantization, round_frozen_products, save_adapter, save_model
from steersman.nn.prepare import check_tokenizer_matches, resolve_model
from steersman.nn.reward import (
    Aspect,
    Member,
    RewardModel,
    RewardSettings,
    combined,
    head_outputs,
    pad_rows,
    write_settings,
)
from steersman.nn.tokens import IGNORE, distinct_pad_token
from training.context import DataFiles, StageContext
from training.mathematics.reward_losses import aspect_loss, binary_loss, pairwise_loss
from training.offline.reward_data import RewardData, ratings_of
from training.offline.reward_evaluation import ScoredPair, evaluate_pairs, evaluate_ratings
from training.offline.trl_setup import (
    Progress,
    for_trl,
    gathered,
    options,
    prepare,
    train,
)
from training.parallel import Ranks

_REFERENCE_ROWS = 256
"""Conversations that mean and standard deviation are measured on."""


def run_reward_model(spec: RewardModelStage, ctx: StageContext) -> dict[str, Path]:
    """Trains every member and returns `model`, `evaluation` and `predictions`.

    Raises:
        DataError: a row is wrong, too long, or lacks its margin or all aspects; the message begins with `file:line`.
    """
    quiet_libraries()
    base = _backbone(spec, ctx)
    tokenizer = load_tokenizer(base, ctx.spec.model.template_options if spec.base is None else None)
    data = RewardData(spec, tokenizer)
    files = ctx.files("aspects" if spec.objective == "aspects" else "preferences")
    work = ctx.stage_dir / "members"
    settings = RewardSettings(
        name=spec.name,
        objective=spec.objective,
        aspects=data.aspect_scales(files.train),
        decide=spec.decide,
        thresholds=spec.thresholds,
        ensemble_mode=spec.ensemble_mode,
        members=[Member(folder=f"member-{number}") for number in range(spec.ensemble)],
        max_length=spec.max_length,
    )
    task = _MemberTraining(spec, ctx, base, data, files, settings.aspects)
    for number in range(spec.ensemble):
        if not (work / f"member-{number}").is_dir():
            task.train(number, work / f"member-{number}")
    artifacts = {"model": ctx.stage_dir / "model"}
    ranks = Ranks.join(ctx.device)
    if ranks.is_first:
        artifacts |= _finish(settings, work, data, files, ctx)
    ranks.barrier()
    return artifacts


def _finish(
    settings: RewardSettings, work: Path, data: RewardData, files: DataFiles, ctx: StageContext
) -> dict[str, Path]:
    """Normalises the trained members, makes one model of them, and measures it."""
    write_settings(work, settings)
    model = load_reward_model(work, device=ctx.device, precision=ctx.precision)
    model.settings = settings = _normalised(model, data, files, ctx)
    artifacts = {"model": ctx.stage_dir / "model"}
    _assemble(settings, work, artifacts["model"])
    evaluation, predictions = _evaluate(model, data, ctx)
    for name, content in (
        ("evaluation.json", json.dumps(evaluation, indent=2).encode()),
        ("predictions.jsonl", b"".join(orjson.dumps(row) + b"\n" for row in predictions)),
    ):
        (ctx.stage_dir / name).write_bytes(content)
        artifacts[name.partition(".")[0]] = ctx.stage_dir / name
    shutil.rmtree(work)
    return artifacts


def _backbone(spec: RewardModelStage, ctx: StageContext) -> Path:
    if spec.base is not None:
        return resolve_model(spec.base, ctx.cache_dir, note=ctx.reporter.note)
    if spec.init_from == "sft" and ctx.sft_model is None:
        ctx.reporter.note("there is no SFT stage before; the reward model starts from the base model")
    return ctx.sft_model if spec.init_from == "sft" and ctx.sft_model is not None else ctx.base_model


@dataclass(frozen=True)
class _MemberTraining:
    """The training of one model of an ensemble; members differ by their seed only."""

    spec: RewardModelStage
    ctx: StageContext
    base: Path
    data: RewardData
    files: DataFiles
    scales: dict[str, Aspect]

    def train(self, number: int, folder: Path) -> None:
        """Writes a trained member as a plain folder."""
        spec, ctx = self.spec, self.ctx
        seed = (ctx.seed + 1000 * number) % 2**32
        if spec.ensemble > 1:
            ctx.reporter.note(f"member {number + 1} of {spec.ensemble}")
        trained = self._start(seed)
        checkpoints = ctx.checkpoints / f"member-{number}"
        arguments = {**options(spec, ctx, seed), "output_dir": str(checkpoints)}
        trainer = (self._pairwise if spec.objective == "pairwise" else self._pointwise)(trained, arguments)
        train(trainer, spec, ctx, folder=checkpoints)
        ranks = Ranks.join(ctx.device)
        trained = gathered(trained, lambda: self._start(seed), ranks)
        if ranks.is_first:
            ctx.reporter.note("saving the reward model")
            if spec.lora is not None:
                adapter = ctx.stage_dir / ("adapter" if spec.ensemble == 1 else f"adapter-{number}")
                save_adapter(trained, adapter, self.data.tokenizer)
                del trainer, trained
                gc.collect()
                merge_to_folder(self.base, adapter, folder)
            else:
                disable_dropout(trained)
                save_model(trained, self.data.tokenizer, folder)
        ranks.barrier()

    def _start(self, seed: int) -> Any:
        """A model as its training starts: a new head and, of LoRA, a new adapter, both drawn from the seed."""
        spec, device, tokenizer = self.spec, self.ctx.device, self.data.tokenizer
        torch.manual_seed(seed)
        outputs = max(1, len(self.scales))
        model = load_classifier(
            self.base, num_labels=outputs, device=device, quantization_config=quantization(spec.lora, device)
        )
        check_tokenizer_matches(model.config, tokenizer, chat=False)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or spec.max_length
        if not is_decoder(model) and spec.max_length > limit - 2:
            raise ConfigError(
                f"rewardModel.maxLength is {spec.max_length}, but the encoder reads {limit - 2} tokens; lower it"
            )
        if is_decoder(model):
            tokenizer.pad_token = distinct_pad_token(tokenizer) or tokenizer.pad_token
            read_last_token(model)
        model.config.pad_token_id = tokenizer.pad_token_id
        trained = prepare(model, spec, seed)
        if spec.lora is not None and self.ctx.precision == "bf16" and Ranks.join(device).world == 1:
            round_frozen_products(trained)
        return trained

    def _pairwise(self, model: Any, arguments: dict[str, Any]) -> Trainer:
        spec = self.spec
        return PairwiseTrainer(
            spec=spec,
            model=model,
            args=RewardConfig(
                **arguments,
                **for_trl(spec),
                center_rewards_coefficient=spec.center_rewards or None,
            ),
            processing_class=self.data.tokenizer,
            **self._rows(self.data.pairs),
        )

    def _pointwise(self, model: Any, arguments: dict[str, Any]) -> Trainer:
        pad, binary = self.data.tokenizer.pad_token_id, self.spec.objective == "binary"

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            ids, mask = pad_rows([row["input_ids"] for row in rows], pad, "cpu")
            return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}

        return PointwiseTrainer(
            model=model,
            args=TrainingArguments(**arguments, prediction_loss_only=True, label_names=["labels"]),
            data_collator=collate,
            binary=binary,
            **self._rows(self.data.judged if binary else lambda path: self.data.rated(path, self.scales)),
        )

    def _rows(self, load: Callable[[Path], Dataset]) -> dict[str, Any]:
        """What every trainer is given besides."""
        return {
            "train_dataset": load(self.files.train),
            "eval_dataset": load(self.files.validation) if self.files.validation else None,
            "callbacks": [Progress(self.ctx)],
        }


def read_last_token(model: nn.Module) -> None:
    """Makes a decoder's score be read at the last token by length, in place.

    transformers looks for the last token that is not the pad token, which overlooks the end of the answer where padding
    is done with EOS.
    """

    def forward(input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=head_outputs(model, input_ids, attention_mask))

    model.forward = forward  # type: ignore[method-assign]


class PairwiseTrainer(RewardTrainer):
    """TRL's trainer with a loss that knows soft labels."""

    def __init__(self, *, spec: RewardModelStage, processing_class: PreTrainedTokenizerBase, **options: Any) -> None:
        pad_id = processing_class.pad_token_id
        assert isinstance(pad_id, int)
        collate = DataCollatorForPreference(pad_token_id=pad_id)
        super().__init__(
            processing_class=processing_class,
            data_collator=lambda rows: {**collate(rows), "soft_label": torch.tensor([r["soft_label"] for r in rows])},
            **options,
        )
        self._spec = spec

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # the rows hold token ids already

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        chosen, rejected = outputs.logits.float().squeeze(-1).chunk(2)
        loss, stats = pairwise_loss(
            chosen,
            rejected,
            denominator=len(chosen),
            margin=inputs.get("margin"),
            centering=self._spec.center_rewards,
            soft_label=inputs["soft_label"],
        )
        mode = "train" if model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        means = stats.means()
        for name, value in (
            ("accuracy", means["accuracy"]),
            ("margin", means["reward"]),
            ("mean_reward", outputs.logits.detach().float().mean().item()),
        ):
            gathered_value = self.accelerator.gather(torch.tensor(value, device=loss.device))
            self._metrics[mode][name].append(gathered_value.mean().item())
        return (loss, outputs) if return_outputs else loss


class PointwiseTrainer(Trainer):
    """Judges answers one by one. The loss is normalised by the labels of the whole optimizer step."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, binary: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._binary = binary

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        ranks = Ranks.join(self.args.device.type)
        # FSDP averages the gradients of the ranks, so each divides by its share of all labels.
        labels = sum(int((batch["labels"] != IGNORE).sum()) for batch in samples)
        return samples, ranks.add(torch.tensor(float(labels))).item() / ranks.world

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits = outputs.logits.float()
        count = num_items_in_batch or int((labels != IGNORE).sum())
        if self._binary:
            loss, _ = binary_loss(logits[:, 0], labels[:, 0], denominator=count)
        else:
            loss, _ = aspect_loss(logits, labels.masked_fill(labels == IGNORE, torch.nan), denominator=count)
        return (loss, outputs) if return_outputs else loss


def _normalised(model: RewardModel, data: RewardData, files: DataFiles, ctx: StageContext) -> RewardSettings:
    """Settings with mean and spread of the rewards on (at most 256 answers of) the validation or training file."""
    ctx.reporter.note("measuring mean and spread of the rewards")
    settings = model.settings
    rows: list[list[int]] = []
    kind: type[Prompt] = Aspects if settings.aspects else Preference
    for where, row in numbered_rows(files.validation or files.train, kind):
        for name in ("chosen", "rejected", "completion"):
            if hasattr(row, name):
                rows.append(data.tokens(row, getattr(row, name), where)[0])
        if len(rows) >= _REFERENCE_ROWS:
            break
    scores = model.score(rows, on_batch=lambda done: ctx.reporter.activity(f"scored {done} of {len(rows)} answers"))
    if len(settings.members) == 1:
        return _with(settings, mean=float(scores.members.mean()), std=float(scores.members.std()) or 1.0)
    members = [
        Member(folder=member.folder, mean=float(raw.mean()), std=float(raw.std()) or 1.0)
        for member, raw in zip(settings.members, scores.members, strict=True)
    ]
    scaled = combined(_with(settings, members=members), scores.members)
    return _with(settings, members=members, mean=float(scaled.mean()), std=float(scaled.std()) or 1.0)


def _with(settings: RewardSettings, **values: Any) -> RewardSettings:
    return settings.model_copy(update=values)


def _assemble(settings: RewardSettings, work: Path, folder: Path) -> None:
    """The folder of one model is the model itself plus `reward.json`; an ensemble has a folder for each member."""
    with atomic_dir(folder) as partial:
        if len(settings.members) == 1:
            shutil.copytree(work / settings.members[0].folder, partial, dirs_exist_ok=True)
            settings = _with(settings, members=[Member(folder=".")])
        else:
            for member in settings.members:
                shutil.copytree(work / member.folder, partial / member.folder)
        write_settings(partial, settings)


def _evaluate(model: RewardModel, data: RewardData, ctx: StageContext) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluation and predictions on the held-out rows (the validation rows where there are none)."""
    result: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = []
    ctx.reporter.note("measuring the reward model on held-out rows")

    def score(rows: list[list[int]]) -> Any:
        return model.score(rows, on_batch=lambda done: ctx.reporter.activity(f"scored {done} of {len(rows)} answers"))

    preferences = ctx.data.get("preferences")
    path = preferences and (preferences.heldout or preferences.validation)
    read = numbered_rows(path, Preference) if path else ()
    rows = [(where, row) for where, row in read if row.soft_label != 0.5]  # a tie has no right side
    if rows:
        chosen = [data.tokens(row, row.chosen, where) for where, row in rows]
        rejected = [data.tokens(row, row.rejected, where) for where, row in rows]
        scores = score([ids for ids, _ in chosen + rejected])
        raw, n = scores.members.mean(0), len(rows)
        pairs = [
            ScoredPair(
                chosen=float(scores.reward[i]),
                rejected=float(scores.reward[n + i]),
                raw_difference=float(raw[i] - raw[n + i]),
                chosen_length=chosen[i][1],
                rejected_length=rejected[i][1],
                margin=row.margin,
            )
            for i, (_, row) in enumerate(rows)
        ]
        result.update(evaluate_pairs(pairs))
        for (where, row), pair in zip(rows, pairs, strict=True):
            values = {"chosen": pair.chosen, "rejected": pair.rejected, "margin": pair.margin}
            predictions.append({"row": row.id or where, **values, "correct": pair.chosen > pair.rejected})
    ratings = ctx.data.get("aspects") if model.settings.aspects else None
    path = ratings and (ratings.heldout or ratings.validation)
    if path:
        names = list(model.settings.aspects)
        rated = list(numbered_rows(path, Aspects))
        scores = score([data.tokens(row, row.completion, where)[0] for where, row in rated])
        aspects = model.settings.aspects
        found = [ratings_of(row, aspects, where) for where, row in rated]
        expected = np.array([[values.get(name, np.nan) for name in names] for values in found])
        result["aspects"] = evaluate_ratings(scores.aspects.numpy(), expected, names)
        for number, (where, answer) in enumerate(rated):
            values = dict(zip(names, scores.aspects[number].tolist(), strict=True))
            predictions.append({"row": answer.id or where, "reward": float(scores.reward[number]), "aspects": values})
    return result, predictions
