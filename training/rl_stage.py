"""The stage `rl`: builds the parts, runs the loop of `training.ppo`, writes the aligned model."""

from __future__ import annotations

import shutil

import torch

from steersman.config.manifest import PpoSpec, RlStage
from steersman.config.stages import reward_model_folders
from steersman.nn.hardware import use_fast_exact_matmul
from steersman.nn.lora import merge_to_folder, save_adapter, save_model
from training.checkpoint import Checkpoints
from training.connect import Services
from training.context import StageContext
from training.policy_model import PolicyModel
from training.ppo import Trainer
from training.prompts import load_answers


def run_rl(spec: RlStage, context: StageContext) -> None:
    """Aligns the policy; `model/` is a plain folder, `adapter/` the PEFT adapter where one was trained."""
    if spec.deterministic:
        torch.use_deterministic_algorithms(True)
    else:
        use_fast_exact_matmul()
    ppo = (spec.ppo or PpoSpec()) if spec.algorithm == "ppo" else None
    services = Services(context, context.policy_model, reference=True)
    prompts = services.prompts("train", spec.generation)
    demonstrations = []
    if ppo is not None and ppo.ptx_coefficient:
        path = context.files("demonstrations").train
        demonstrations = load_answers(path, services.tokenizer, services.stop_ids)
    context.reporter.note(f"{len(prompts)} prompts, {spec.algorithm}, {'LoRA' if spec.lora else 'full fine-tuning'}")
    rewards = list(reward_model_folders(context.run, context.name, context.run_dir).values())
    model = PolicyModel(
        context.policy_model,
        spec.lora,
        ppo.critic if ppo is not None else None,
        rewards[0] if rewards else None,
        device=context.device,
        precision=context.precision,
        temperature=spec.generation.temperature,
        seed=context.seed,
    )
    checkpoints = context.stage_dir / "checkpoints"
    Trainer(
        spec,
        model,
        services.rollouts(spec.generation),
        services.policy,
        prompts,
        Checkpoints(checkpoints),
        context.reporter,
        seed=context.seed,
        demonstrations=demonstrations,
    ).run()
    context.reporter.activity("writing the aligned model")
    if spec.lora is not None:
        save_adapter(model.policy, context.stage_dir / "adapter")
        merge_to_folder(context.policy_model, context.stage_dir / "adapter", context.stage_dir / "model")
    else:
        save_model(model.policy, services.tokenizer, context.stage_dir / "model")
    shutil.rmtree(checkpoints, ignore_errors=True)
