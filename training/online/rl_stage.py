"""The stage `rl`: builds the parts, runs the loop of `training.online.loop`, writes the aligned model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from steersman.config.manifest import RlStage
from steersman.config.stages import reward_model_folders
from steersman.errors import ConfigError
from steersman.nn.hardware import use_fast_exact_matmul
from steersman.nn.load import load_tokenizer
from steersman.nn.lora import merge_to_folder, quantization, save_adapter, save_model
from steersman.nn.tokens import generation_config_of, stop_ids, tokenizer_fingerprint
from training.algorithms import build
from training.context import StageContext
from training.online.checkpoint import Checkpoints
from training.online.connect import Services
from training.online.licences import check_rewards
from training.online.loop import RlLoop
from training.online.passes import Pair
from training.online.policy_model import PolicyModel
from training.online.prompts import load_answers
from training.online.watch import open_watcher
from training.parallel import Ranks


def run_rl(spec: RlStage, context: StageContext) -> None:
    """Aligns the policy; `model/` is a plain folder, `adapter/` the PEFT adapter where one was trained."""
    quantization(spec.lora, context.device)
    critic_folder = _critic_folder(spec, context)
    demonstrations = _demonstrations(spec, context)
    if spec.deterministic:
        torch.use_deterministic_algorithms(True)
    else:
        use_fast_exact_matmul()
    ranks = Ranks.join(context.device)
    with Services(context, context.policy_model, reference=True) if ranks.is_first else nullcontext() as services:
        prompts = services.prompts("train", spec.generation) if services is not None else []
        context.reporter.note(
            f"{len(prompts)} prompts, {spec.algorithm}, {'LoRA' if spec.lora else 'full fine-tuning'}"
            + (f", rank {ranks.rank} of {ranks.world}" if ranks.world > 1 else "")
        )
        if services is not None:
            check_rewards(context, services, spec.reward)
        model = build_model(spec, context, critic_folder)
        for part in (model.policy, model.critic):
            if part is not None:
                ranks.shard(part)
        mask = build(spec).mask
        options: dict[str, Any] = {"deterministic": spec.deterministic, "mask_top_p": mask.top_p if mask else None}
        rollouts = services.rollouts(spec.generation, **options) if services is not None else None
        watcher = (
            open_watcher(spec, services, context, rollouts) if services is not None and rollouts is not None else None
        )
        RlLoop(
            spec,
            model,
            rollouts,  # type: ignore[arg-type]
            services.policy if services is not None else None,  # type: ignore[arg-type]
            prompts,
            Checkpoints(context.checkpoints),
            context.reporter,
            seed=context.seed,
            demonstrations=demonstrations,
            ranks=ranks,
            watcher=watcher,
        ).run()
    state = model.trained_state() if ranks.world > 1 else None
    if ranks.is_first:
        state = (watcher.kept() if watcher is not None else None) or state
        if ranks.world > 1:
            model = build_model(spec, context, critic_folder)
        if state is not None:
            model.load_trained_state(state)
    if ranks.is_first:
        context.reporter.activity("writing the aligned model")
        write_model(spec, context, model)
    ranks.barrier()


def build_model(spec: RlStage, context: StageContext, critic_folder: Path | None) -> PolicyModel:
    """Policy and critic as the stage starts with them."""
    return PolicyModel(
        context.policy_model,
        spec.lora,
        build(spec).critic,
        critic_folder,
        device=context.device,
        precision=context.precision,
        temperature=spec.generation.temperature,
        seed=context.seed,
        gradient_checkpointing=spec.gradient_checkpointing,
    )


def write_model(spec: RlStage, context: StageContext, model: PolicyModel) -> None:
    """Writes `adapter/` where there is one and then `model/`."""
    policy: Any = model.policy
    if spec.lora is not None:
        save_adapter(policy, context.stage_dir / "adapter")
        merge_to_folder(context.policy_model, context.stage_dir / "adapter", context.stage_dir / "model")
    else:
        save_model(policy, load_tokenizer(context.policy_model), context.stage_dir / "model")


def _critic_folder(spec: RlStage, context: StageContext) -> Path | None:
    """The reward model that a separate critic starts from; None without one.

    Raises:
        ConfigError: it has another vocabulary than the policy, whose tokens a critic values.
    """
    critic = build(spec).critic
    if critic is None or critic.kind != "rewardModel":
        return None
    name, folder = next(iter(reward_model_folders(context.run, context.name, context.run_dir).items()))
    members = [path for path in (folder, *sorted(folder.glob("*"))) if (path / "tokenizer_config.json").is_file()]
    fingerprints = [tokenizer_fingerprint(load_tokenizer(path)) for path in (context.policy_model, *members[:1])]
    if len(set(fingerprints)) > 1:
        raise ConfigError(
            f"{spec.algorithm}.critic.kind is rewardModel, but reward model {name} has another tokenizer than the "
            "policy; use kind: valueHead"
        )
    return folder


def _demonstrations(spec: RlStage, context: StageContext) -> Sequence[Pair]:
    """What PPO-ptx learns beside; read before any model is loaded."""
    if not build(spec).ptx_coefficient:
        return ()
    tokenizer = load_tokenizer(context.policy_model, context.spec.model.template_options)
    stops = stop_ids(tokenizer, generation_config_of(context.policy_model))
    return load_answers(context.files("demonstrations").train, tokenizer, stops)
