"""The stage `evaluate`: base against SFT against the aligned model on held-out prompts.

All models answer the same prompts with the same seeds through the policy service, each published to it
as full weights; the reward service scores; the reference gives the KL; exact checks are computed here.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from steersman import gates
from steersman.artifacts import storage_errors
from steersman.config.manifest import EvaluateStage, OnlineStage, Override, ReleaseStage, RewardMix, RlStage
from steersman.config.stages import data_digests, stages_before
from steersman.errors import FailedPreconditionError
from steersman.gates import Finding
from steersman.judges.comparing import JudgeOfPairs, Rivals
from steersman.judges.licence import enforce
from steersman.local.knowledge import Scores, compare_knowledge
from steersman.nn.ilql import read_heads
from steersman.nn.load import load_causal_lm
from steersman.report.overoptimisation import LOOKS_FILE, read_looks
from steersman.report.schema import (
    Evaluation,
    JudgeResult,
    LicenceResult,
    Message,
    RewardModelEvaluation,
    Sample,
    Watched,
    prompt_of,
)
from steersman.rewards import Reward, build_reward
from steersman.suites.asked import SuiteResult
from training.context import StageContext
from training.online.connect import Services
from training.online.licences import check_judge, check_rewards
from training.online.publication import WeightsPayload
from training.online.rollout import Prompt, Scored, cut_share, reward_of, warn_of_cut_answers
from training.online.watch import planned_looks
from training.suites import ask_suites


def run_evaluate(spec: EvaluateStage, context: StageContext) -> None:
    """Writes evaluation.json and gates.json; a gate that is not passed ends the stage with FailedPreconditionError,
    unless the release that follows overrides it."""
    models = _models(spec, context)
    with Services(context, context.policy_model, reference=bool(context.spec.services.reference.endpoints)) as services:
        licences = check_rewards(context, services, _mix(context), "gate")
        judges = _licensed(spec, context, licences)
        results, suites, seconds = _answer(spec, context, services, models)
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
        suites=tuple(suites),
        knowledge=_knowledge(spec, context, models),
        watched=_watched(context),
        judges=_judge(judges, context, results),
        licences=licences,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        settings=spec.model_dump(mode="json", by_alias=True),
        data=data_digests(context.run, context.run_dir),
    )
    findings = gates.check_gates(spec.gates, evaluation)
    with storage_errors(context.stage_dir):
        (context.stage_dir / "evaluation.json").write_text(evaluation.model_dump_json(indent=1))
        (context.stage_dir / "gates.json").write_text(json.dumps([asdict(found) for found in findings], indent=1))
    pass_gates(spec, evaluation, override_of(context))


def _models(spec: EvaluateStage, context: StageContext) -> dict[str, Path]:
    """What is compared, from before to after."""
    models = {"champion": Path(spec.champion)} if spec.champion is not None else {}
    models["base"] = context.base_model
    if context.sft_model is not None:
        models["sft"] = context.sft_model
    if context.policy_model not in (context.base_model, context.sft_model):
        models["rlhf"] = context.policy_model
    return models


def _knowledge(spec: EvaluateStage, context: StageContext, models: Mapping[str, Path]) -> Scores:
    """The tasks of every model; of the one that is served now only where the gate compares with it."""
    if spec.knowledge is None:
        return {}
    gate = spec.gates.knowledge  # type: ignore[attr-defined]
    champion = gate is not None and gate.against == "champion"
    chosen = {name: folder for name, folder in models.items() if name != "champion" or champion}
    asked = spec.knowledge
    return compare_knowledge(
        chosen, Path(asked.folder), asked.tasks, limit=asked.limit, device=context.device, note=context.reporter.note
    )


def override_of(context: StageContext) -> Override | None:
    """That of the first release behind this stage, or of this one."""
    later = context.run.stages()[context.run.stage_names().index(context.name) :]
    return next((stage.override for _, stage in later if isinstance(stage, ReleaseStage)), None)


def _answer(
    spec: EvaluateStage, context: StageContext, services: Services, models: Mapping[str, Path]
) -> tuple[dict[str, tuple[Sample, ...]], list[SuiteResult], dict[str, float]]:
    """Scored answers of every model to the same prompts, its suites, and the seconds that they took."""
    checks = {check.name: build_reward(check.name, check.options) for check in spec.checks}
    heldout = context.files("prompts").heldout is not None
    if not heldout:
        context.reporter.note("data.prompts.heldout is missing: the models answer training prompts, which shows less")
    prompts = services.prompts("heldout" if heldout else "train", spec.generation)[: spec.max_prompts]
    results: dict[str, tuple[Sample, ...]] = {}
    suites: list[SuiteResult] = []
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
        suites += ask_suites(spec, context, services.policy, name)
        seconds[name] = time.monotonic() - start
        warn_of_cut_answers(cut_share(itertools.chain(*scored)), spec.generation, context.reporter)
        rewards = [sample.reward for sample in results[name] if sample.reward is not None]
        context.reporter.step(number, len(models), reward=sum(rewards) / max(len(rewards), 1))
    return results, suites, seconds


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All parameters of a plain model folder by the names that the loaded model gives them, in the folder's dtype.

    A file's own names are those of whoever wrote it: experts one by one, buffers, a hub's prefix, a second format. The
    heads of an ILQL policy are among them.
    """
    own = {name: one.data for name, one in load_causal_lm(folder, dtype="auto").named_parameters()}
    return {**own, **read_heads(folder)}


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
        scores={name: value for name, value in item.score.parts.items() if "." not in name and math.isfinite(value)}
        if len(item.score.parts) > 1
        else {},
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


def _mix(context: StageContext) -> RewardMix:
    """Of the newest online stage before this one, which evaluation scores with."""
    online = [stage for _, stage in stages_before(context.run, context.name) if isinstance(stage, OnlineStage)]
    return online[-1].reward if online else RewardMix()


def _licensed(
    spec: EvaluateStage, context: StageContext, licences: dict[str, LicenceResult]
) -> dict[str, JudgeOfPairs]:
    """The LLM judges, whose licences go to the others.

    Raises:
        FailedPreconditionError: one has none, and `spec.licence.without` is `refuse`.
    """
    judges = {}
    for judge in spec.judges:
        context.reporter.activity(f"judge {judge.name}: agreement with people")
        judges[judge.name] = JudgeOfPairs(judge)
        licences[judge.name] = check_judge(context, judges[judge.name])
        enforce({judge.name: licences[judge.name]}, context.spec.licence, context.reporter.note, "gate")
    return judges


def _judge(
    judges: Mapping[str, JudgeOfPairs], context: StageContext, results: Mapping[str, Sequence[Sample]]
) -> dict[str, JudgeResult]:
    """What every judge says of every two models' first answers."""
    found = {}
    for name, judge in judges.items():
        context.reporter.activity(f"judge {name}")
        found[name] = judge.result(rivals(results, judge.spec.prompts))
        if found[name].missing:
            said = f"{found[name].missing} comparisons without a verdict: {found[name].reason}"
            context.reporter.note(f"judge {name}: {said}")
    return found


def rivals(results: Mapping[str, Sequence[Sample]], prompts: int) -> list[Rivals]:
    """Every two models' first answers to the first prompts, the later model first."""
    first: dict[str, dict[str, Sample]] = {}
    for name, samples in results.items():
        for sample in samples:
            first.setdefault(name, {}).setdefault(prompt_of(sample.prompt_id), sample)
    chosen = list(itertools.islice(next(iter(first.values())), prompts))
    return [
        Rivals(
            first[one][key].prompt_id, [message.model_dump() for message in first[one][key].prompt], one, other,
            first[one][key].answer, first[other][key].answer,
        )
        for other, one in itertools.combinations(first, 2)
        for key in chosen
    ]  # fmt: skip


def _watched(context: StageContext) -> Watched | None:
    """Of the newest online stage before this one."""
    for name, stage in reversed(stages_before(context.run, context.name)):
        if isinstance(stage, RlStage):
            looks = read_looks(context.run_dir / name / LOOKS_FILE)
            watch = stage.watch
            if watch is None or not looks:
                return None
            planned = len(planned_looks(watch, stage.steps))
            return Watched(looks=looks, planned=planned, false_alarms=watch.false_alarms)
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


def pass_gates(spec: EvaluateStage, evaluation: Evaluation, override: Override | None = None) -> list[Finding]:
    """What every gate found.

    Raises:
        FailedPreconditionError: one is not passed that the override does not cover; the message has the figures.
    """
    findings = gates.check_gates(spec.gates, evaluation)
    problems = [found.text for found in gates.failed(findings) if override is None or not override.covers(found.gate)]
    if problems:
        raise FailedPreconditionError("the gates are not passed: " + "; ".join(problems))
    return findings
