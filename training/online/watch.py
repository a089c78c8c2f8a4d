"""Looks at checkpoints with scorers that training never uses (`rl.watch`): the curve, the alarm, what to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steersman.artifacts import atomic_dir, storage_errors
from steersman.config.manifest import RlStage, Watch
from steersman.errors import ConfigError
from steersman.report.overoptimisation import (
    LOOKS_FILE,
    Alarm,
    Look,
    find_alarm,
    read_looks,
    recommended,
    write_looks,
)
from training.context import Reporter, StageContext
from training.online.connect import Services
from training.online.rollout import Prompt, Rollouts, Scored, reward_of

SEED_OF_LOOKS = 1 << 31
"""Beyond the seeds of steps: every look draws with it."""


@dataclass(frozen=True)
class Found:
    """What a look tells the loop."""

    metrics: dict[str, float]
    keep: bool
    """The checkpoint is the recommended one so far."""
    stop: bool


class Watcher:
    """Looks every few steps. Only the first of several ranks has one."""

    def __init__(
        self,
        spec: Watch,
        steps: int,
        rollouts: Rollouts,
        prompts: Sequence[Prompt],
        scorers: Sequence[str],
        folder: Path,
        kept: Path,
        seed: int,
        reporter: Reporter,
    ) -> None:
        """Args:
        steps: of the whole stage.
        prompts: every look asks them all.
        scorers: names of those that training never uses.
        folder: of the stage; `watch.jsonl` goes there.
        kept: folder for the recommended checkpoint.
        """
        self._spec, self._steps = spec, steps
        self._rollouts, self._prompts, self._scorers = rollouts, prompts, scorers
        self._file, self._kept = folder / LOOKS_FILE, kept
        self._seed = (seed << 32) + SEED_OF_LOOKS
        self._reporter = reporter
        self.looks: list[Look] = []

    def restart(self, done: int) -> None:
        """Forgets looks at steps that a killed run has to do again."""
        self.looks = [look for look in read_looks(self._file) if look.step <= done]

    def due(self, step: int) -> bool:
        """Whether this step is looked at and was not yet."""
        return step in planned_looks(self._spec, self._steps) and all(look.step != step for look in self.looks)

    @property
    def stopped(self) -> bool:
        """Whether an earlier look ended the training."""
        return self._spec.on_alarm == "stop" and self.alarm() is not None

    def alarm(self) -> Alarm | None:
        """Of the last look."""
        return find_alarm(self.looks, len(planned_looks(self._spec, self._steps)), self._spec.false_alarms)

    def look(self, step: int) -> Found:
        """Asks the policy that is published."""
        self._reporter.activity("looking with scorers that training never uses")
        scored, _ = self._rollouts.collect(self._prompts, self._spec.samples_per_prompt, self._seed)
        look = _look(step, self._prompts, scored, self._scorers)
        self.looks.append(look)
        with storage_errors(self._file):
            write_looks(self._file, self.looks)
        alarm = self.alarm()
        if alarm is not None:
            self._reporter.note(f"warning: {alarm.text}")
        metrics = {"watch_reward": look.mean(), "watch_kl": look.kl, "watch_alarm": float(alarm is not None)}
        metrics |= {f"watch_{name}": look.mean(name) for name in self._scorers}
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return Found(finite, recommended(self.looks).step == step, alarm is not None and self._spec.on_alarm == "stop")

    def keep(self, state: Mapping[str, Any]) -> None:
        """Writes the weights of the recommended checkpoint."""
        with atomic_dir(self._kept) as folder:
            torch.save(dict(state), folder / "state.pt")

    def kept(self) -> dict[str, Any] | None:
        """Weights of the recommended checkpoint, where `take` asks for it and it is not the last one."""
        if self._spec.take != "recommended" or not self.looks:
            return None
        best = recommended(self.looks)
        if best is self.looks[-1] or not (self._kept / "state.pt").is_file():
            return None
        self._reporter.note(f"takes the recommended checkpoint, after step {best.step}")
        state: dict[str, Any] = torch.load(self._kept / "state.pt", weights_only=True)
        return state


def planned_looks(spec: Watch, steps: int) -> list[int]:
    """Steps after which is looked: before the first, every few, and after the last."""
    return [*range(0, steps, spec.every), steps]


def open_watcher(spec: RlStage, services: Services, context: StageContext, rollouts: Rollouts) -> Watcher | None:
    """The stage's watcher; None without `rl.watch`.

    Raises:
        ConfigError: every scorer of the reward service is trained on.
    """
    watch = spec.watch
    if watch is None:
        return None
    unseen = [scorer.name for scorer in services.reward[0].info().scorers if not scorer.weight]
    if not unseen:
        raise ConfigError(
            "rl.watch needs a scorer that training never uses: add watch.scorers, or a verifiable reward of weight 0"
        )
    split = "validation" if context.files("prompts").validation is not None else "train"
    prompts = services.prompts(split, spec.generation)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(context.seed)).tolist()
    chosen = [prompts[index] for index in sorted(order[: watch.prompts])]
    if len(chosen) < 3:
        raise ConfigError(f"rl.watch needs at least three prompts, data.prompts.{split} has {len(chosen)}")
    return Watcher(
        watch, spec.steps, rollouts, chosen, unseen, context.stage_dir, context.checkpoints / "recommended",
        context.seed, context.reporter,
    )  # fmt: skip


def _look(step: int, prompts: Sequence[Prompt], scored: Sequence[Sequence[Scored]], scorers: Sequence[str]) -> Look:
    def by_prompt(value: Any) -> dict[str, float]:
        """Mean of the finite values of every prompt that has one."""
        found = {}
        for number, (prompt, items) in enumerate(zip(prompts, scored, strict=True)):
            values = [one for one in map(value, items) if math.isfinite(one)]
            if values:
                found[f"{number}:{prompt.key}"] = sum(values) / len(values)
        return found

    kls = list(by_prompt(_kl).values())
    return Look(
        step=step,
        kl=sum(kls) / len(kls) if kls else 0.0,
        reward=by_prompt(lambda item: reward_of(item.score)),
        scorers={name: by_prompt(lambda item, name=name: item.score.parts.get(name, math.nan)) for name in scorers},
    )


def _kl(item: Scored) -> float:
    """k1 over the tokens of the policy."""
    if item.ref_logprobs is None or not len(item.sample.logprobs):
        return math.nan
    return float((item.sample.logprobs - item.ref_logprobs[item.sample.loss_mask]).sum())
