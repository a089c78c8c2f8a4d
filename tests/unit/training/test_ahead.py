"""Generation ahead of training: how far ahead, how old its weights may be, and what happens to older samples."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_ppo_update import build, make_batch, options_of

from steersman.errors import FailedPreconditionError
from training.online.ahead import Ahead
from training.online.clients import Sample, Score
from training.online.experience import Collector
from training.online.rollout import Prompt, Scored, exclude_stale


def test_without_staleness_nothing_overlaps() -> None:
    events: list[str] = []
    threads = set()

    def make(step: int) -> int:
        events.append(f"make {step}")
        threads.add(threading.current_thread())
        return step

    with Ahead(make, range(3), 0) as ahead:
        for step in range(3):
            assert ahead.take() == step
            events.append(f"train {step}")
    assert events == ["make 0", "train 0", "make 1", "train 1", "make 2", "train 2"]
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_no_batch_is_begun_with_weights_older_than_the_limit(staleness: int) -> None:
    """`published` counts the steps whose weights are out when a batch is begun."""
    published = 0
    begun: dict[int, int] = {}

    def make(step: int) -> int:
        begun[step] = published
        return step

    with Ahead(make, range(12), staleness) as ahead:
        for step in range(12):
            assert ahead.take() == step
            published = step + 1
    ages = [step - begun[step] for step in range(12)]
    assert max(ages) <= staleness
    assert min(ages) >= 0


def test_a_failure_of_generation_reaches_the_trainer() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise RuntimeError("no more")
        return step

    with Ahead(make, range(4), 2) as ahead:
        assert ahead.take() == 0
        with pytest.raises(RuntimeError, match="no more"):
            ahead.take()


def test_stale_samples_leave_the_batch_and_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    batch = make_batch(build(tiny_model, tmp_path, **options_of("grpo")).model)
    ages = torch.tensor([0, 1, 2, 3] * 3)
    kept, stale = exclude_stale(batch, ages, 1)
    assert (len(kept), stale) == (6, 6)
    assert kept.lengths.tolist() == batch.lengths[ages <= 1].tolist()
    assert len(kept.engine_logprobs) == int(kept.lengths.sum())
    with pytest.raises(
        FailedPreconditionError, match="every sample of the batch is more than maxStaleness 1 steps old"
    ):
        exclude_stale(batch, ages + 2, 1)


def test_the_trainer_dates_samples_by_their_version(tiny_model: Path, tmp_path: Path) -> None:
    """Two samples of a prompt carry older versions: one within the limit, which stays, and one beyond it."""
    trainer = build(tiny_model, tmp_path, max_staleness=1, prompts_per_step=2, **options_of("grpo"))
    prompts = [Prompt(np.arange(4, 8, dtype=np.int32), [{"role": "user", "content": "a"}])] * 2
    trainer.steps_of_version = {7: 0, 8: 1, 9: 2}
    versions = [[9, 9, 8, 7], [9, 9, 9, 9]]

    def collect(prompts: Any, n: int, seed: int, *, first: int, in_flight: bool, progress: tuple[int, int]) -> Any:
        assert in_flight
        tokens, logprobs = np.array([40, 2], np.int32), np.array([-5.0, -5.0], np.float32)
        scored = [
            [
                Scored(
                    Sample(group, index, tokens, logprobs, True, (version,)),
                    Score(1.0),
                    logprobs,
                    "x",
                )
                for index, version in enumerate(row)
            ]
            for group, row in enumerate(versions)
        ]
        return scored, {"generated_tokens": 16.0}

    rollouts: Any = SimpleNamespace(collect=collect, standardised={})
    collector = Collector(trainer.spec, trainer.method, rollouts, prompts, 1, trainer.steps_of_version.__getitem__)
    experience = collector.collect(2)
    assert experience.metrics["stale"] == 1
    assert experience.metrics["staleness"] == pytest.approx((1 + 2) / 8)
    assert experience.batch.versions.tolist() == [9, 9, 8, 9, 9, 9, 9]


def test_a_stale_sample_is_corrected(tiny_model: Path, tmp_path: Path) -> None:
    """Where the engine's weights were others, a token counts by pi_trainer / pi_engine, at most the cap."""
    from test_ppo_update import gradients

    def gradient(shift: float) -> torch.Tensor:
        trainer = build(tiny_model, tmp_path, **options_of("grpo"))
        batch = make_batch(trainer.model)
        with torch.no_grad():
            own = trainer.passes.old(batch, trainer.passes.plan(batch, 0), None)[0]
        found, _ = gradients(trainer, replace(batch, engine_logprobs=own - shift))
        return torch.cat([value.flatten() for value in found.values()])

    on_policy = gradient(0.0)
    torch.testing.assert_close(gradient(0.5), on_policy * float(np.exp(0.5)), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(gradient(5.0), on_policy * 2.0, atol=1e-6, rtol=1e-3)
