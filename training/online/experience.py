"""What one step learns from: prompts of the step, sampled and scored, without what cannot be learned from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from steersman.config.manifest import RlStage
from training.algorithms import Method
from training.batch import SampleBatch
from training.mathematics.moments import Moments
from training.online.rollout import Prompt, Rollouts, exclude_failed, exclude_stale, to_batch

SEEDS = 2**64
"""Seeds of torch's generators are below it."""


@dataclass(frozen=True, eq=False)
class Experience:
    """Everything rank 0 has collected for one step."""

    batch: SampleBatch
    metrics: dict[str, float]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"batch": self.batch.state(), "metrics": self.metrics}

    @staticmethod
    def of(state: dict[str, Any]) -> Experience:
        return Experience(SampleBatch.of(state["batch"]), state["metrics"])


class Collector:
    """Makes the experience of any step: a function of the seed, the step and the policy's weights."""

    def __init__(
        self,
        stage: RlStage,
        method: Method,
        rollouts: Rollouts,
        prompts: Sequence[Prompt],
        seed: int,
        steps_of_version: Callable[[int], int],
    ) -> None:
        """Args:
        steps_of_version: steps that were done when a weights version was published.
        """
        self._stage = stage
        self._method = method
        self._rollouts = rollouts
        self._prompts = prompts
        self._seed = seed
        self._steps_of_version = steps_of_version
        self._order = lru_cache(4)(self._permutation)

    def collect(self, step: int) -> Experience:
        """Samples prompts until enough of them teach something, or the method's rounds are over."""
        stage = self._stage
        kept: list[SampleBatch] = []
        all_of_round: list[SampleBatch] = []
        metrics: dict[str, float] = {}
        asked, wanted = 0, stage.prompts_per_step
        for number in range(self._method.rounds):
            prompts = self.prompts_of(step) if not number else self._further_prompts(step, number, wanted)
            batch, found = self._round(step, prompts, asked)
            metrics = {name: metrics.get(name, 0.0) + value for name, value in found.items()}
            asked += len(prompts)
            useful = batch.select(self._method.informative(batch))
            all_of_round.append(batch)
            kept.append(useful)
            wanted -= len(useful.group.unique())
            if wanted <= 0:
                break
        seen = SampleBatch.joined(all_of_round)
        batch = SampleBatch.joined(kept)
        if not len(batch):
            batch = all_of_round[-1]  # nothing to learn: no advantage, so no change
        if self._method.rounds > 1:
            metrics["prompts_sampled"] = float(asked)
            metrics["prompts_kept"] = float(len(batch.group.unique()))
        if stage.max_staleness:
            metrics["staleness"] /= len(all_of_round)
        return Experience(batch, _describe(seen) | metrics)

    def _round(self, step: int, prompts: Sequence[Prompt], first: int) -> tuple[SampleBatch, dict[str, float]]:
        """Samples of some prompts that can be learned from, and counts and seconds.

        Args:
            first: index of the first prompt among all of the step.
        """
        stage = self._stage
        scored, timing = self._rollouts.collect(
            prompts,
            stage.samples_per_prompt,
            self.step_seed(step),
            first=first,
            in_flight=stage.max_staleness > 0,
            progress=(step, stage.steps),
        )
        batch = to_batch(prompts, scored, self._rollouts.standardised)
        batch, counts = exclude_failed(batch, scored, stage.max_failed_share)
        if stage.max_staleness:
            ages = step - torch.tensor([self._steps_of_version(version) for version in batch.versions.tolist()])
            batch, stale = exclude_stale(batch, ages, stage.max_staleness)
            counts |= {"staleness": ages.float().mean().item(), "stale": float(stale)}
        return batch, counts | timing

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of a step: a function of the seed and the step alone, so that a resumed run repeats it."""
        count = self._stage.prompts_per_step
        picked = []
        for position in range(step * count, (step + 1) * count):
            epoch, index = divmod(position, len(self._prompts))
            picked.append(self._prompts[self._order(self._seed * 7919 + epoch)[index]])
        return picked

    def _further_prompts(self, step: int, number: int, count: int) -> list[Prompt]:
        """Prompts of a further round, other than those of the step's own where there are enough."""
        own = {id(prompt) for prompt in self.prompts_of(step)}
        order = self._permutation((self.step_seed(step) * 13 + number) % SEEDS)
        others = [self._prompts[index] for index in order if id(self._prompts[index]) not in own]
        pool = others or list(self._prompts)
        return [pool[index % len(pool)] for index in range(count)]

    def _permutation(self, seed: int) -> list[int]:
        return torch.randperm(len(self._prompts), generator=torch.Generator().manual_seed(seed)).tolist()

    def step_seed(self, step: int) -> int:
        return step_seed(self._seed, step)


def step_seed(seed: int, step: int) -> int:
    """Below 2^64 for every seed of a manifest."""
    return (seed << 32) + step


def _describe(batch: SampleBatch) -> dict[str, float]:
    scores = Moments.of(batch.scores)
    return {
        "reward": scores.mean,
        "reward_std": scores.std,
        **{f"reward_{name}": Moments.of(values).mean for name, values in batch.parts.items()},
        "length": batch.lengths.float().mean().item() if len(batch) else math.nan,
        "no_eos": 1.0 - batch.ended.float().mean().item() if len(batch) else math.nan,
    }
