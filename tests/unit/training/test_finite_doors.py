"""Nothing that is not finite passes a door; a killed process continues as if nothing had happened."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stage_context import Recorder
from test_ppo_update import build, gradients, make_batch, options_of

from steersman.config.algorithms import PpoSpec
from steersman.config.manifest import Lora, Optimizer
from steersman.errors import FailedPreconditionError
from training.online.clients import Sample, Score
from training.online.experience import Collector
from training.online.rollout import Prompt, Scored

FLAT = {"schedule": "constant", "warmup_ratio": 0.0}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.trained_state().items()}


def test_an_update_that_is_not_finite_is_not_made_and_the_second_in_a_row_pauses(
    tiny_model: Path, tmp_path: Path
) -> None:
    """An infinite score that nobody stopped: advantages, loss and gradient are NaN."""
    trainer = build(tiny_model, tmp_path, lora=Lora(rank=4), **options_of("reinforce"))
    batch = make_batch(trainer.model)
    scores = batch.scores.clone()
    scores[0] = math.inf
    bad = replace(batch, scores=scores)
    before = weights(trainer)
    metrics = trainer.update(bad, 0)
    assert (metrics["updates"], metrics["bad_updates"]) == (0.0, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert trainer.update(batch, 1)["updates"] == 1  # one good update forgives it
    trainer.update(bad, 2)
    with pytest.raises(FailedPreconditionError, match=r"2 updates in a row .* none of them was made"):
        trainer.update(bad, 3)
    assert trainer.model.is_finite()


def test_a_gradient_that_is_not_finite_is_not_taken(tiny_model: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, **options_of("ppo"))
    before = weights(trainer)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer._critic[0].grad[0] = math.nan
    assert trainer.optimizer.step(0.5) is None
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


class Services:
    """A policy and rollouts without a network: the batches are given, and what is published is remembered."""

    def __init__(self, trainer: Any, batches: list[Any]) -> None:
        self.version = 0
        self.published: list[bool] = []
        self.batches = batches
        self.trainer = trainer
        trainer.policy = self
        trainer.collector = SimpleNamespace(collect=self.collect)

    def info(self) -> Any:
        return SimpleNamespace(model=SimpleNamespace(dtype="bf16"))  # the batches are as far off as bf16 explains

    def publish(self, payload: Any) -> float:
        self.version += 1
        self.published.append(all(bool(value.isfinite().all()) for value in payload.tensors.values()))
        return 0.0

    def collect(self, step: int) -> Any:
        from training.online.experience import Experience

        return Experience(self.batches[step], {"reward": 0.0, "generated_tokens": 10.0})


def running(folder: Path, tmp_path: Path, **options: Any) -> tuple[Any, Services]:
    trainer = build(folder, tmp_path, **options)
    trainer.reporter = Recorder()
    return trainer, Services(trainer, [make_batch(trainer.model, seed=seed) for seed in range(trainer.spec.steps)])


def test_a_learning_rate_that_breaks_the_weights_leaves_the_good_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """3e38 a step is more than fp32 holds: the weights are infinite, and neither written nor published."""
    good, _ = running(tiny_model, tmp_path, steps=2, lora=Lora(rank=4), **options_of("grpo"))
    good.run()
    wild = Optimizer(learning_rate=3e38, **FLAT)
    options = {"steps": 4, "lora": Lora(rank=4), "optimizer": wild, **options_of("grpo")}
    trainer, services = running(tiny_model, tmp_path, **options)
    with pytest.raises(FailedPreconditionError, match=r"not finite.*lower optimizer\.learningRate"):
        trainer.run()
    assert all(services.published)
    again, _ = running(tiny_model, tmp_path, steps=4, lora=Lora(rank=4), **options_of("grpo"))
    step, _ = again.restore()
    assert step >= 2
    assert again.model.is_finite()


def test_policy_and_critic_are_clipped_apart(tiny_model: Path, tmp_path: Path) -> None:
    """A critic that is wrong by thousands does not shrink the policy's step."""
    steps = []
    for scale in (1.0, 1e4):
        options = {"optimizer": Optimizer(max_grad_norm=1.0, **FLAT), **options_of("ppo")}
        trainer = build(tiny_model, tmp_path, **options)
        for parameter in trainer.optimizer._policy:
            parameter.grad = torch.full_like(parameter, 1e-5)
        for parameter in trainer.optimizer._critic:
            parameter.grad = torch.full_like(parameter, scale)
        seen: dict[str, float] = {}

        def look(trainer: Any = trainer, seen: dict[str, float] = seen) -> None:
            for name in ("_policy", "_critic"):
                parts = [p.grad.square().sum() for p in getattr(trainer.optimizer, name) if p.grad is not None]
                seen[name] = math.sqrt(sum(map(float, parts)))

        trainer.optimizer._adam.step = look
        norms = trainer.optimizer.step(0.5)
        assert norms is not None
        assert norms["critic_grad_norm"] > scale
        steps.append(seen)
    assert steps[0]["_policy"] == pytest.approx(steps[1]["_policy"])
    assert steps[1]["_critic"] == pytest.approx(1.0, rel=1e-3)


def test_demonstrations_are_learned_at_temperature_1(tiny_model: Path, tmp_path: Path) -> None:
    """The sampling temperature is the policy's business; a demonstration is text."""
    generator = np.random.default_rng(5)
    pair = (generator.integers(4, 260, 6).astype(np.int32), generator.integers(4, 260, 5).astype(np.int32))
    found = []
    for temperature in (1.0, 0.5):
        trainer = build(
            tiny_model, tmp_path, generation={"temperature": temperature}, **options_of("ppo", ptx_coefficient=1.0)
        )
        trainer.passes.demonstrations_backward([pair], 1.0, 0, 0)
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_a_row_that_was_not_written_is_in_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """Killed between checkpoint and metrics row: the process that continues writes the row, the same."""
    trainer, _ = running(tiny_model, tmp_path, steps=2, lora=Lora(rank=4), **options_of("grpo"))

    class Killed(Exception): ...

    def die(step: int, total: int, **metrics: float) -> None:
        if step == 2:
            raise Killed

    written: Any = trainer.reporter
    reported = written.step
    trainer.reporter.step = die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    del reported
    again, _ = running(tiny_model, tmp_path, steps=2, lora=Lora(rank=4), **options_of("grpo"))
    again.run()
    ((step, total, row),) = again.reporter.steps
    assert (step, total) == (2, 2)
    assert {"reward", "kl", "grad_norm", "seconds", "seconds_publish", "tokens_per_s"} <= row.keys()


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_run_with_batches_under_way_resumes_bit_equal(tiny_model: Path, tmp_path: Path, staleness: int) -> None:
    """The batch of a step depends on the weights that it was made with: on resuming it is the saved one."""

    def made(name: str, stop: int | None) -> Any:
        options = {"steps": 6, "max_staleness": staleness, "lora": Lora(rank=4), **options_of("grpo")}
        trainer, services = running(tiny_model, tmp_path / name, **options)

        def collect(step: int) -> Any:
            from training.online.experience import Experience

            if step == stop:
                raise KeyboardInterrupt
            version = services.version  # the batch shows which weights it was made with
            batch = services.batches[step]
            return Experience(replace(batch, scores=batch.scores * version), {"generated_tokens": 1.0})

        # Numbers of versions start anew in a process; what counts is after how many steps they were published.
        services.version = 0
        trainer.collector = SimpleNamespace(collect=collect)
        original = trainer.publish

        def publish(steps: int) -> float:
            seconds = original(steps)
            services.version = steps + 1
            return seconds

        trainer.publish = publish
        return trainer

    whole = made("whole", None)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        made("killed", 4).run()
    resumed = made("killed", None)
    resumed.run()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_further_prompts_are_asked_for_until_enough_teach_something(tiny_model: Path, tmp_path: Path) -> None:
    """DAPO's dynamic sampling: prompts whose samples all score alike are replaced, in new places of the step."""
    trainer = build(tiny_model, tmp_path, prompts_per_step=3, samples_per_prompt=2, **options_of("dapo"))
    prompts = [Prompt(np.array([4 + number], np.int32), [], key=str(number)) for number in range(8)]
    asked: list[tuple[int, list[str]]] = []

    def collect(given: Any, n: int, seed: int, *, first: int, in_flight: bool, progress: tuple[int, int]) -> Any:
        asked.append((first, [prompt.key for prompt in given]))
        tokens, logprobs = np.array([40, 2], np.int32), np.array([-5.0, -5.0], np.float32)
        scored = [
            [
                Scored(Sample(g, i, tokens, logprobs, True, (1,)), Score(float(i * (int(p.key) % 2))), logprobs, "x")
                for i in range(n)
            ]
            for g, p in enumerate(given)
        ]
        return scored, {"generated_tokens": 4.0}

    rollouts: Any = SimpleNamespace(collect=collect, standardised={})
    experience = Collector(trainer.spec, trainer.method, rollouts, prompts, 1, lambda _: 0).collect(0)
    assert [first for first, _ in asked] == list(np.cumsum([0, *(len(keys) for _, keys in asked)]))[:-1]
    odd = sum(int(key) % 2 for _, keys in asked for key in keys)
    assert len(experience.batch.group.unique()) == odd
    assert odd >= 3 or len(asked) == 3
    assert not set(asked[0][1]) & set(asked[1][1])
    assert experience.metrics["prompts_sampled"] == sum(len(keys) for _, keys in asked)
    assert experience.batch.scores.unique().tolist() == [0.0, 1.0]
    found, _ = gradients(trainer, experience.batch)
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_seeds_up_to_the_last_one_work(tiny_model: Path, tmp_path: Path) -> None:
    from training.online.experience import step_seed

    trainer = build(tiny_model, tmp_path, minibatches=2, **options_of("grpo"))
    trainer.passes._seed = 2**32 - 1
    assert step_seed(2**32 - 1, 10_000) < 2**64
    assert len(trainer.passes.plan(make_batch(trainer.model), 10_000)) == 2
    assert isinstance(PpoSpec().gamma, float)


def test_prompts_that_say_nothing_leave_the_weights_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Not even the momentum of earlier updates moves them, on any number of ranks."""
    trainer = build(tiny_model, tmp_path, lora=Lora(rank=4), **options_of("online-dpo"))
    batch = make_batch(trainer.model)
    trainer.update(batch, 0)
    before = weights(trainer)
    metrics = trainer.update(replace(batch, scores=torch.ones_like(batch.scores), ended=torch.ones(12, dtype=bool)), 1)
    assert metrics["updates"] == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
