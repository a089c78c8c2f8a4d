"""The stage `evaluate`: base against SFT against the aligned model on held-out prompts.

All models answer the same prompts with the same seeds through the policy service, each published to it
as full weights; the reward service scores; the reference gives the KL; exact checks are computed here.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steersman.artifacts import storage_errors
from steersman.config.manifest import EvaluateStage
from steersman.errors import FailedPreconditionError
from steersman.nn.load import load_causal_lm
from steersman.report.schema import Evaluation, Message, RewardModelEvaluation, Sample
from steersman.rewards import Reward, build_reward
from training.context import StageContext
from training.online.connect import Services
from training.online.publication import WeightsPayload
from training.online.rollout import Prompt, Scored, cut_share, reward_of, warn_of_cut_answers


def run_evaluate(spec: EvaluateStage, context: StageContext) -> None:
    """Writes evaluation.json; a gate that is not passed ends the stage with FailedPreconditionError."""
    models = {"base": context.base_model}
    if context.sft_model is not None:
        models["sft"] = context.sft_model
    if context.policy_model not in models.values():
        models["rlhf"] = context.policy_model
    with Services(context, context.policy_model, reference=bool(context.spec.services.reference.endpoints)) as services:
        results, seconds = _answer(spec, context, services, models)
    evaluation = Evaluation(
        name=context.run.metadata.name,
        seed=context.seed,
        models=results,
        heldout=context.files("prompts").heldout is not None,
        reward_model=_reward_model_evaluation(context),
        logprob_mismatch=_mean_mismatch(context),
        seconds=seconds,
        base_model=context.spec.model.base,
        hardware=f"{context.device}, {context.precision}",
    )
    with storage_errors(context.stage_dir):
        (context.stage_dir / "evaluation.json").write_text(evaluation.model_dump_json(indent=1))
    check_gates(spec, evaluation)


def _answer(
    spec: EvaluateStage, context: StageContext, services: Services, models: Mapping[str, Path]
) -> tuple[dict[str, tuple[Sample, ...]], dict[str, float]]:
    """Scored answers of every model to the same prompts, and the seconds that they took."""
    checks = {check.name: build_reward(check.name, check.options) for check in spec.checks}
    heldout = context.files("prompts").heldout is not None
    if not heldout:
        context.reporter.note("data.prompts.heldout is missing: the models answer training prompts, which shows less")
    prompts = services.prompts("heldout" if heldout else "train", spec.generation)[: spec.max_prompts]
    results: dict[str, tuple[Sample, ...]] = {}
    seconds: dict[str, float] = {}
    for number, (name, folder) in enumerate(models.items(), start=1):
        start = time.monotonic()
        context.reporter.note(f"{name}: {len(prompts)} {'held-out' if heldout else 'training'} prompts")
        services.policy.publish(WeightsPayload("full", read_weights(folder)))
        # Every model starts each prompt from the same seed: the comparison is paired.
        scored, _ = services.rollouts(spec.generation).collect(prompts, spec.samples_per_prompt, context.seed << 20)
        results[name] = tuple(
            _sample(prompt, index, item, checks)
            for prompt, items in zip(prompts, scored, strict=True)
            for index, item in enumerate(items)
        )
        seconds[name] = time.monotonic() - start
        warn_of_cut_answers(cut_share(itertools.chain(*scored)), spec.generation, context.reporter)
        rewards = [sample.reward for sample in results[name] if sample.reward is not None]
        context.reporter.step(number, len(models), reward=sum(rewards) / max(len(rewards), 1))
    return results, seconds


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All parameters of a plain model folder by the names that the loaded model gives them, in the folder's dtype.

    A file's own names are those of whoever wrote it: experts one by one, buffers, a hub's prefix, a second format.
    """
    return {name: one.data for name, one in load_causal_lm(folder, dtype="auto").named_parameters()}


def _sample(prompt: Prompt, index: int, item: Scored, checks: Mapping[str, Reward]) -> Sample:
    kl = None
    if item.ref_logprobs is not None:
        kl = float((item.sample.logprobs - item.ref_logprobs).sum())
    return Sample(
        prompt_id=f"{prompt.key}#{index}",
        prompt=tuple(Message(role=m["role"], content=m["content"]) for m in prompt.messages),
        answer=item.text,
        reward=reward if math.isfinite(reward := reward_of(item.score)) else None,
        rubric=rubric_of(prompt, item.text, checks),
        kl=kl,
        length=len(item.sample.token_ids),
        finish_reason="stop" if item.sample.ended else "length",
    )


def rubric_of(prompt: Prompt, answer: str, checks: Mapping[str, Reward]) -> dict[str, float]:
    """`total` and criteria of the first check, and every other check's value by its name."""
    facts = json.loads(prompt.facts_json) if prompt.facts_json else {}
    found: dict[str, float] = {}
    for name, check in checks.items():
        verdict = check(prompt.messages, answer, facts)
        if found:
            found[name] = verdict.value
        else:
            found = {"total": verdict.value} | (dict(verdict.criteria) or {name: verdict.value})
    return found


def _reward_model_evaluation(context: StageContext) -> RewardModelEvaluation | None:
    """What the reward-model stage measured on held-out comparisons, where there was one."""
    for path in sorted(context.run_dir.glob("reward-model*/evaluation.json")):
        data: dict[str, Any] = json.loads(path.read_text())
        if "pairs" in data:
            return RewardModelEvaluation.model_validate({key: data[key] for key in RewardModelEvaluation.model_fields})
    return None


def _mean_mismatch(context: StageContext) -> float | None:
    """Mean over the RL steps of the difference between engine and trainer."""
    values = [
        row["mismatch_mean_abs"]
        for path in context.run_dir.glob("rl*/metrics.jsonl")
        for row in map(json.loads, path.read_text().splitlines())
        if "mismatch_mean_abs" in row
    ]
    return sum(values) / len(values) if values else None


def check_gates(spec: EvaluateStage, evaluation: Evaluation) -> None:
    """Raises FailedPreconditionError with the numbers when a gate is not passed."""
    problems = []
    for gate, limit in spec.gates.items():
        if gate == "reward":
            low = evaluation.change(evaluation.start, evaluation.aligned).difference.low
            if low < limit:
                problems.append(f"the reward gains at least {low:.3f} over {evaluation.start}, {limit} is asked for")
        elif gate == "rewardAccuracy":
            accuracy = evaluation.reward_model.accuracy if evaluation.reward_model else 0.0
            if accuracy < limit:
                problems.append(f"the reward model's accuracy is {accuracy:.3f}, {limit} is asked for")
        else:
            samples = evaluation.models[evaluation.aligned]
            share = sum(sample.finish_reason != "stop" for sample in samples) / len(samples)
            if share > limit:
                problems.append(f"{share:.1%} of the answers do not end, at most {limit:.1%} may")
    if problems:
        raise FailedPreconditionError("the gates are not passed: " + "; ".join(problems))
