"""What the stages that TRL trains have in common: options, progress, checkpoints, the start and the end.

TRL computes the losses. Around it: no padding and no repeated prompts in the trunk (`steersman.nn.forward`), the LM
head only where a label is, progress for the reporter, checkpoints by time, and artifacts that appear whole or not at
all.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from steersman.artifacts import storage_errors
from steersman.config.manifest import SupervisedStage
from steersman.errors import ConfigError, DataError, FailedPreconditionError
from steersman.leaving import asked, leave, saves_between_steps
from steersman.nn.dropout import disable_dropout
from steersman.nn.encoder_decoder import refuse_encoder_decoder
from steersman.nn.fused_layers import fuse_layers
from steersman.nn.load import load_causal_lm, load_tokenizer, quiet_libraries
from steersman.nn.lora import attach_lora, merge_to_folder, quantization, save_adapter, save_model
from steersman.nn.parity import skip_padding
from steersman.nn.prepare import check_tokenizer_matches
from steersman.nn.tokens import stop_ids
from training.context import DataFiles, StageContext
from training.parallel import Ranks, whole
from training.schedule import factor_of_step

CHECKPOINT_SECONDS = 30.0
"""Least time between two checkpoints."""
FEW_STEPS = 5
"""A stage of fewer optimizer steps says so."""
FLAT_SHARE = 0.005
"""Share by which the loss must fall between the first and the last quarter of the steps."""
CHECKPOINT_SHARE = 0.05
"""Of the time that may go into writing them: with a large model they become rarer."""


def check_length(length: int, limit: int, where: str) -> None:
    if length > limit:
        raise DataError(f"{where}: {length} tokens, but maxLength is {limit}; shorten the row or raise maxLength")


@dataclass(frozen=True)
class Start:
    """A model ready to be trained."""

    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]


def start_causal(folder: Path, spec: SupervisedStage, ctx: StageContext, *, decoder_for: str | None = None) -> Start:
    """Loads the policy in fp32, with an adapter where the stage has one.

    Args:
        decoder_for: of a stage that takes decoders only; the refusal of others begins with it.

    Raises:
        ConfigError: the model does not fit the tokenizer, or the stage.
    """
    quiet_libraries()
    if decoder_for is not None:
        refuse_encoder_decoder(AutoConfig.from_pretrained(folder), decoder_for)
    tokenizer = load_tokenizer(folder, ctx.spec.model.template_options)
    model = load_causal_lm(folder, device=ctx.device, quantization_config=quantization(spec.lora, ctx.device))
    check_tokenizer_matches(model.config, tokenizer)
    stops = stop_ids(tokenizer, model.generation_config)
    return Start(folder, prepare(model, spec, ctx.seed), tokenizer, stops)


def reference_of(start: Start, spec: SupervisedStage, ctx: StageContext) -> PreTrainedModel | None:
    """The frozen model that the policy is held against; None with an adapter, without which the policy is it."""
    if spec.lora is not None:
        return None
    reference = load_causal_lm(start.folder, device=ctx.device)
    quicken(reference)
    return reference


def prepare(model: PreTrainedModel, spec: SupervisedStage, seed: int) -> nn.Module:
    """Adapter (its start drawn from `seed`), the trunk without padding, the head without what has no label."""
    project_labelled_positions_only()
    set_seed(seed)
    trained: nn.Module = model if spec.lora is None else attach_lora(model, spec.lora)
    if spec.lora is None or not spec.lora.dropout:
        disable_dropout(trained)
    quicken(trained)
    return trained


def quicken(model: nn.Module) -> None:
    """No padding in the trunk, fewer passes between its products; policy and reference alike: they begin equal."""
    skip_padding(model)
    if next(model.parameters()).is_cpu:  # where it was measured
        fuse_layers(model)


def options(spec: SupervisedStage, ctx: StageContext, seed: int | None = None) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments` that do not depend on the method."""
    ranks = Ranks.join(ctx.device).world  # before Accelerate joins, whose process group would carry no CPU tensors
    if spec.batch_size % ranks:
        raise ConfigError(
            f"batchSize is {spec.batch_size}, which {ranks} trainer.workers cannot share; make it a multiple"
        )
    share = spec.batch_size // ranks
    micro = min(spec.micro_batch_size, share)
    if share % micro:
        micro = math.gcd(share, micro)
    return {
        "output_dir": str(ctx.checkpoints),
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "num_train_epochs": spec.epochs,
        "max_steps": spec.max_steps or -1,
        "learning_rate": spec.optimizer.learning_rate,
        "lr_scheduler_type": "constant",  # `train` replaces it
        "weight_decay": spec.optimizer.weight_decay,
        "max_grad_norm": spec.optimizer.max_grad_norm,
        # fused: one kernel for all parameters; it takes no sharded ones.
        "optim": "adamw_torch_fused" if ranks == 1 else "adamw_torch",
        "fsdp": True if ranks > 1 else None,
        "fsdp_config": {"version": 2, "reshard_after_forward": True} if ranks > 1 else None,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if spec.gradient_checkpointing else None,
        "bf16": ctx.precision == "bf16",
        "use_cpu": ctx.device == "cpu",
        "dataloader_pin_memory": ctx.device != "cpu",
        "seed": ctx.seed if seed is None else seed,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide a loss that is no number
        "save_strategy": "no",  # `Progress` decides by time
        "save_total_limit": 1,
        "remove_unused_columns": False,
        "log_level": "error",
    }


def for_trl(spec: SupervisedStage) -> dict[str, Any]:
    """What the configurations of TRL's trainers take besides: rows are as long as `check_length` lets them be."""
    return {"max_length": None, "disable_dropout": not (spec.lora and spec.lora.dropout)}


class Progress(TrainerCallback):
    """Tells the reporter about every step, saves from time to time, and stops at a loss that is no number."""

    def __init__(self, ctx: StageContext) -> None:
        self._reporter = ctx.reporter
        self._ranks = Ranks.join(ctx.device)
        self._saved = self._saving = time.monotonic()
        self._cost = 0.0
        """Seconds that the last checkpoint took."""
        self._counted: tuple[float, float] | None = None
        """(seconds, tokens) at the last log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reporter.activity(f"working on step {state.global_step + 1} of {state.max_steps}")

    on_substep_end = on_step_begin

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reporter.activity("measuring the validation loss")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            return  # the model itself is written next
        if not self._ranks.all(not asked()):
            control.should_save = control.should_training_stop = True
            self._saving = time.monotonic()
            return
        pause = max(CHECKPOINT_SECONDS, self._cost / CHECKPOINT_SHARE)
        # Ranks save together, so one clock decides.
        if self._ranks.from_first(lambda: time.monotonic() - self._saved >= pause):
            control.should_save = True
            self._saving = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()
        self._cost = self._saved - self._saving

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            return
        metrics = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float))}
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise FailedPreconditionError(
                f"the loss is not a number at step {state.global_step}; lower optimizer.learningRate or use "
                "precision fp32"
            )
        now, tokens = time.monotonic(), metrics.get("num_tokens", 0.0)
        if self._counted is not None and tokens > self._counted[1]:
            metrics["tokens_per_second"] = (tokens - self._counted[1]) / (now - self._counted[0])
        self._counted = (now, tokens)
        self._reporter.step(state.global_step, state.max_steps, **metrics)


def train(
    trainer: Trainer, spec: SupervisedStage, ctx: StageContext, *, folder: Path | None = None, may_stay: bool = False
) -> dict[str, float]:
    """Trains to the end, from the newest complete checkpoint where there is one, and measures the validation loss.

    Args:
        may_stay: the data may ask for no change.

    Raises:
        FailedPreconditionError: no weight has changed.
    """
    trainer.remove_callback(PrinterCallback)
    folder = folder or ctx.checkpoints
    newest = newest_checkpoint(folder)
    if newest is not None:
        ctx.reporter.note(f"continuing from {newest.name}")
    trainer.create_scheduler = functools.partial(_create_scheduler, trainer, spec)  # type: ignore[method-assign]
    before = fingerprint(trainer.model)
    with storage_errors(folder), saves_between_steps():
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    ranks = Ranks.join(ctx.device)
    stopped = trainer.state.global_step < trainer.state.max_steps and trainer.control.should_training_stop
    if stopped and not ranks.all(not asked()):
        leave()  # all of them, whichever was asked to
    unchanged = ranks.all(fingerprint(trainer.model) == before)
    if unchanged and may_stay:
        ctx.reporter.note(f"warning: stage {ctx.name} has changed no weight; the data asks for no change")
    elif unchanged:
        raise FailedPreconditionError(
            f"stage {ctx.name} has changed no weight: every gradient was 0, or the learning rate is too small for the "
            "weights' precision; look at the data and raise optimizer.learningRate"
        )
    rows = len(trainer.train_dataset)  # type: ignore[arg-type]
    for warning in what_was_not_learned(trainer.state.log_history, rows):
        ctx.reporter.note(f"warning: {warning}")
    return trainer.evaluate() if trainer.eval_dataset is not None else {}


def train_against_reference(
    start: Start,
    spec: SupervisedStage,
    ctx: StageContext,
    files: DataFiles,
    load: Callable[[Path], Dataset],
    make: Callable[..., Trainer],
    *,
    may_stay: Callable[[Dataset], bool] = lambda rows: False,
) -> dict[str, Path]:
    """Trains the policy by a loss that compares it with where it started, and returns its folders.

    Args:
        load: a file's rows as the trainer takes them.
        make: the trainer.
        may_stay: whether the rows may ask for no change.
    """
    reference = reference_of(start, spec, ctx)
    rows = load(files.train)
    trainer = make(
        model=start.model,
        ref_model=reference,
        train_dataset=rows,
        eval_dataset=load(files.validation) if files.validation else None,
        processing_class=start.tokenizer,
        callbacks=[Progress(ctx)],
    )
    train(trainer, spec, ctx, may_stay=may_stay(rows))
    del trainer, reference
    return finish_causal(start, spec, ctx)


def _create_scheduler(trainer: Trainer, spec: SupervisedStage, num_training_steps: int, optimizer: Any = None) -> Any:
    """In place of the Trainer's, whose warm-up begins with a step at rate 0."""
    trainer.lr_scheduler = LambdaLR(
        optimizer or trainer.optimizer,  # type: ignore[arg-type]
        lambda step: factor_of_step(spec.optimizer, step, num_training_steps),
    )
    return trainer.lr_scheduler


@torch.no_grad()
def fingerprint(model: Any) -> list[tuple[float, float]]:
    """Two sums of every trained parameter, this rank's part of it; they differ when any of them has changed."""
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).double()
            found.append((float(values.sum()), float(values.square().sum())))
    return found


def what_was_not_learned(log: Sequence[Mapping[str, Any]], rows: int) -> list[str]:
    """Sentences about a stage that ran through and yet learned little."""
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    steps = len(losses)
    if 0 < steps < FEW_STEPS:
        return [
            f"{rows} rows made {steps} optimizer step{'s' if steps > 1 else ''}, too few to learn much from; raise "
            "epochs, lower batchSize or bring more rows"
        ]
    share = max(1, steps // 4)
    first, last = sum(losses[:share]) / share, sum(losses[-share:]) / share
    if steps and last > first - FLAT_SHARE * abs(first):
        return [
            f"the loss did not fall ({first:.4g} at the start, {last:.4g} at the end); look at the data, or change "
            "optimizer.learningRate"
        ]
    return []


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose state, which is written last, can be read; a killed writer's is passed over."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        return path
    return None


def finish_causal(start: Start, spec: SupervisedStage, ctx: StageContext) -> dict[str, Path]:
    """Writes `model` (plain folder) and, of LoRA, `adapter`; returns them by name. Every rank must call it."""
    artifacts = {"model": ctx.stage_dir / "model"}
    if spec.lora is not None:
        artifacts["adapter"] = ctx.stage_dir / "adapter"
    ranks = Ranks.join(ctx.device)
    trained = gathered(start.model, lambda: start_causal(start.folder, spec, ctx).model, ranks)
    if ranks.is_first:
        ctx.reporter.note("saving the adapter and merging it" if spec.lora is not None else "saving the model")
        if spec.lora is not None:
            save_adapter(trained, artifacts["adapter"])
            merge_to_folder(start.folder, artifacts["adapter"], artifacts["model"], stop_ids=start.stop_ids)
        else:
            save_model(trained, start.tokenizer, artifacts["model"], start.stop_ids)
    ranks.barrier()
    gc.collect()
    return artifacts


def gathered(model: Any, build: Callable[[], Any], ranks: Ranks) -> Any:
    """The model with whole weights on the first rank; every rank must call it.

    Args:
        model: as it was trained, its layers sharded where there are several ranks.
        build: makes it as it was before training.
    """
    if ranks.world == 1:
        return model
    state = {name: whole(value.data) for name, value in model.named_parameters() if value.requires_grad}
    if not ranks.is_first:
        return model
    fresh = build()
    fresh.load_state_dict(state, strict=False)
    return fresh


def project_labelled_positions_only() -> None:
    """Makes TRL's fused LM head project only the positions that carry a label, on every device.

    TRL 1.16 does so where Triton runs; elsewhere it projects prompts and padding too, because compilers of some
    accelerators dislike changing shapes. On a CPU those projections cost a third of a training step.
    """
    assert hasattr(trl.trainer.utils, "_use_triton"), "TRL has changed; look at add_fused_lm_head"
    trl.trainer.utils._use_triton = lambda device: True
