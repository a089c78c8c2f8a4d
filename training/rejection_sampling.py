"""Rejection sampling fine-tuning (Llama 2, section 3.2.3).

Each round: n samples a prompt -> the best by reward -> fine-tune on the winners -> publish. With
`keepEarlierWinners` the best answer of all rounds so far wins, Llama 2's remedy against forgetting.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from steersman.artifacts import atomic_dir, read_json, storage_errors, write_whole
from steersman.config.manifest import RejectionSamplingStage, SftStage
from steersman.errors import FailedPreconditionError
from steersman.nn.tokens import IGNORE, LabelledTokens
from training.context import StageContext
from training.evaluate import read_weights
from training.offline.sft import run_sft
from training.online.connect import Services
from training.online.licences import check_rewards
from training.online.publication import WeightsPayload
from training.online.rollout import Prompt, Scored, count_failed, cut_share, reward_of, warn_of_cut_answers


def run_rejection_sampling(spec: RejectionSamplingStage, context: StageContext) -> None:
    """Writes `model/` and, per round, the winners; complete rounds are not repeated."""
    with Services(context, context.policy_model, reference=False) as services:
        prompts = services.prompts("train", spec.generation)
        check_rewards(context, services, spec.reward)
        model = context.policy_model
        for number in range(spec.rounds):
            folder = context.stage_dir / f"round-{number + 1}"
            winners, row = folder / "winners.jsonl", folder / "row.json"
            if not (winners.is_file() and row.is_file()):
                services.policy.publish(WeightsPayload("full", read_weights(model)))
                _write_winners(spec, context, services, prompts, number, winners, row)
            # A round that is done reports again, so that the metrics are whole whatever happened to their file.
            context.reporter.step(number + 1, spec.rounds, **(read_json(row, f"remove {folder} and start again") or {}))
            if not (folder / "model").is_dir():
                _fine_tune(spec, context, model, winners, services.max_context)
            model = folder / "model"
    with atomic_dir(context.stage_dir / "model") as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)


def _write_winners(
    spec: RejectionSamplingStage,
    context: StageContext,
    services: Services,
    prompts: list[Prompt],
    number: int,
    path: Path,
    row_path: Path,
) -> None:
    """Samples a round's answers with the published policy; writes the best of each prompt, and the round's metrics."""
    chosen = prompts_of_round(prompts, spec.prompts_per_round, number, context.seed)
    rollouts = services.rollouts(spec.generation)
    scored, timing = rollouts.collect(
        chosen, spec.samples_per_prompt, (context.seed << 32) + number, progress=(number, spec.rounds)
    )
    count_failed(scored, spec.max_failed_share)
    warn_of_cut_answers(cut_share(itertools.chain(*scored)), spec.generation, context.reporter)
    found = [winner_row(prompt, items) for prompt, items in zip(chosen, scored, strict=True)]
    earlier = _earlier_winners(context, number) if spec.keep_earlier_winners else {}
    rows = merge_winners([row for row in found if row is not None], earlier)
    if not rows:
        raise FailedPreconditionError(
            f"round {number + 1} has no winner: no sample ended by itself within "
            f"{spec.generation.max_new_tokens} tokens; raise generation.maxNewTokens or train SFT longer"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with storage_errors(partial):
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = [reward for items in scored for item in items if math.isfinite(reward := reward_of(item.score))]
    row = {
        "reward": sum(rewards) / len(rewards),
        "reward_best": sum(one["reward"] for one in rows) / len(rows),
        "winners": float(len(rows)),
        **timing,
    }
    write_whole(row_path, json.dumps(row))
    partial.rename(path)  # last: a round with its winners has its row


def _fine_tune(
    spec: RejectionSamplingStage, context: StageContext, model: Path, winners: Path, max_length: int
) -> None:
    """Trains on the winners from the round's model.

    Args:
        max_length: longest conversation that the policy can have sampled.
    """
    stage = SftStage(
        lora=spec.lora,
        optimizer=spec.optimizer,
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        micro_batch_size=spec.micro_batch_size,
        gradient_checkpointing=spec.gradient_checkpointing,
        max_length=max_length,
    )
    round_context = replace(context, stage_dir=winners.parent, policy_model=model)
    with context.reporter.rows_in(winners.parent / "metrics.jsonl"):
        run_sft(stage, round_context, labelled_winners(winners))
    shutil.rmtree(round_context.checkpoints, ignore_errors=True)


def prompts_of_round(prompts: list[Prompt], count: int, number: int, seed: int) -> list[Prompt]:
    """The prompts of a round: all are used once before any is used again."""
    picked = []
    for position in range(number * count, (number + 1) * count):
        epoch, index = divmod(position, len(prompts))
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 104_729 + epoch))
        picked.append(prompts[int(order[index])])
    return picked


def labelled_winners(path: Path) -> list[LabelledTokens]:
    """The winners' tokens as they were sampled; only the new answer is trained, no earlier turn of the prompt."""
    found = []
    for row in map(json.loads, path.read_text().splitlines()):
        prompt, answer = row["prompt_ids"], row["answer_ids"]
        found.append(LabelledTokens(prompt + answer, [IGNORE] * len(prompt) + answer))
    return found


def winner_row(prompt: Prompt, items: list[Scored]) -> dict | None:
    """The demonstration row of the sample with the highest reward that ended by itself, and its tokens as sampled.

    None where no sample ended.
    """
    good = [item for item in items if math.isfinite(reward_of(item.score)) and item.sample.ended and item.text]
    best = max(good, key=lambda item: item.score.reward, default=None)
    if best is None:
        return None
    return {
        "id": prompt.key,
        "messages": [*prompt.messages, {"role": "assistant", "content": best.text}],
        "reward": best.score.reward,
        "prompt_ids": prompt.ids.tolist(),
        "answer_ids": best.sample.token_ids.tolist(),
    }


def merge_winners(new: list[dict], earlier: dict[str, dict]) -> list[dict]:
    """The better of the new and the earlier winner of every prompt; earlier prompts stay in."""
    merged = dict(earlier)
    for row in new:
        if row["id"] not in merged or row["reward"] > merged[row["id"]]["reward"]:
            merged[row["id"]] = row
    return list(merged.values())


def _earlier_winners(context: StageContext, number: int) -> dict[str, dict]:
    if not number:
        return {}
    path = context.stage_dir / f"round-{number}" / "winners.jsonl"
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
