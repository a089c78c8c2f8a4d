"""The update on a real model: what it computes does not depend on how the work is cut up, and it repeats exactly."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numeric import assert_same, gradients_of

from steersman.config.algorithms import ONLINE_METHODS, Critic, NlpoSpec, PpoSpec
from steersman.config.manifest import Lora, Optimizer, RlStage
from steersman.nn.packed import pack
from training import algorithms as methods
from training.batch import SampleBatch
from training.online.checkpoint import Checkpoints
from training.online.loop import RlLoop
from training.online.optimizer import learning_rate_factor
from training.online.policy_model import PolicyModel
from training.parallel import Ranks

ALGORITHMS = list(ONLINE_METHODS)


class Silent:
    def note(self, text: str) -> None: ...
    def activity(self, text: str) -> None: ...
    def step(self, step: int, total: int, **metrics: float) -> None: ...


def build(folder: Path, tmp_path: Path, *, lora: Lora | None = None, ranks: Ranks = Ranks(), **options: Any) -> RlLoop:
    """A trainer of a tiny Llama without services: `update` needs none."""
    spec = RlStage(lora=lora, **options)
    model = PolicyModel(
        folder,
        spec.lora,
        methods.build(spec).critic,
        None,
        device="cpu",
        precision="fp32",
        temperature=spec.generation.temperature,
        seed=0,
        gradient_checkpointing=spec.gradient_checkpointing,
    )
    ranks.shard(model.policy)
    nothing: Any = None
    return RlLoop(spec, model, nothing, nothing, [], Checkpoints(tmp_path), Silent(), seed=1, ranks=ranks)


def options_of(algorithm: str, **ppo: Any) -> dict[str, Any]:
    if algorithm == "nlpo":
        return {"algorithm": "nlpo", "nlpo": NlpoSpec(critic=Critic(kind="valueHead"), refresh_every=2, **ppo)}
    if algorithm != "ppo":
        return {"algorithm": algorithm}
    return {"algorithm": "ppo", "ppo": PpoSpec(critic=Critic(kind="valueHead"), **ppo)}


def make_batch(model: PolicyModel, *, groups: int = 3, n: int = 4, seed: int = 0) -> SampleBatch:
    """Random answers of unequal length, scored at random; the engine's log-probabilities are a little off."""
    generator = np.random.default_rng(seed)
    prompts = tuple(generator.integers(4, 260, size=length).astype(np.int32) for length in (5, 9, 3)[:groups])
    lengths = generator.integers(1, 8, size=groups * n)
    responses = tuple(generator.integers(4, 260, size=length).astype(np.int32) for length in lengths)
    group = torch.arange(groups).repeat_interleave(n)
    packed = pack([(prompts[g], responses[g * n : (g + 1) * n]) for g in range(groups)])
    with torch.no_grad():
        logprobs = model.logprobs(packed)
    noise = torch.from_numpy(generator.normal(scale=0.05, size=len(logprobs)).astype(np.float32))
    return SampleBatch(
        prompts=prompts,
        responses=responses,
        loss_mask=tuple(np.ones(len(response), dtype=bool) for response in responses),
        group=group,
        lengths=torch.from_numpy(lengths).long(),
        engine_logprobs=logprobs + noise,
        ref_logprobs=logprobs - 0.1 * noise,
        scores=torch.from_numpy(generator.normal(size=groups * n).astype(np.float32)),
        parts={},
        ended=torch.from_numpy(generator.random(groups * n) > 0.3),
        versions=torch.zeros(groups * n, dtype=torch.int64),
    )


def reordered(batch: SampleBatch, order: list[int]) -> SampleBatch:
    """The same samples in another order inside their prompts."""
    parts = torch.split(torch.arange(int(batch.lengths.sum())), batch.lengths.tolist())
    tokens = torch.cat([parts[index] for index in order])
    index = torch.tensor(order)
    return replace(
        batch,
        responses=tuple(batch.responses[i] for i in order),
        loss_mask=tuple(batch.loss_mask[i] for i in order),
        group=batch.group[index],
        lengths=batch.lengths[index],
        engine_logprobs=batch.engine_logprobs[tokens],
        ref_logprobs=batch.ref_logprobs[tokens],
        scores=batch.scores[index],
        ended=batch.ended[index],
        versions=batch.versions[index],
    )


def gradients(trainer: RlLoop, batch: SampleBatch) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and metrics of one update, before the optimizer takes them."""
    seen: dict[str, torch.Tensor] = {}

    def capture(progress: float, *, only_critic: bool = False) -> dict[str, float]:
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.clone()
        trainer.optimizer.clear()
        return {"grad_norm": 0.0}

    trainer.optimizer.step = capture  # type: ignore[method-assign]
    return seen, trainer.update(batch, 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_do_not_change_gradients_and_metrics(algorithm: str, tiny_model: Path, tmp_path: Path) -> None:
    results = []
    for budget in (4096, 40, 1):
        trainer = build(tiny_model, tmp_path, micro_batch_tokens=budget, **options_of(algorithm))
        results.append(gradients(trainer, make_batch(trainer.model)))
    for grads, metrics in results[1:]:
        assert_same(results[0][0], grads)
        assert metrics == pytest.approx(results[0][1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("more", [{"minibatches": 2}, {"epochs": 2}])
def test_the_first_pass_of_a_step_serves_old_values_and_update(more: Any, tiny_model: Path, tmp_path: Path) -> None:
    apart = build(tiny_model, tmp_path, micro_batch_tokens=1, **options_of("ppo"), **more)
    wanted = gradients(apart, make_batch(apart.model))
    trainer = build(tiny_model, tmp_path, **options_of("ppo"), **more)
    batch = make_batch(trainer.model)
    passes: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _, given: passes.append(len(given[0].targets)))
    found = gradients(trainer, batch)
    tokens = len(batch.engine_logprobs)
    assert sum(passes) == (2 * tokens - passes[0] if "minibatches" in more else 2 * tokens)
    assert_same(found[0], wanted[0])
    assert found[1] == pytest.approx(wanted[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_order_of_samples_does_not_matter(algorithm: str, tiny_model: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, **options_of(algorithm))
    batch = make_batch(trainer.model)
    expected = gradients(trainer, batch)
    trainer = build(tiny_model, tmp_path, **options_of(algorithm))
    mixed = gradients(trainer, reordered(batch, [3, 1, 0, 2, 7, 6, 5, 4, 8, 11, 9, 10]))
    assert_same(expected[0], mixed[0])
    assert mixed[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-6)


def test_the_packed_forward_equals_each_sequence_alone(tiny_model: Path, tmp_path: Path) -> None:
    model = build(tiny_model, tmp_path, **options_of("ppo")).model
    batch = make_batch(model)
    together = model(pack([(batch.prompts[0], batch.responses[:4]), (batch.prompts[1], batch.responses[4:8])]))
    alone = [model(pack([(batch.prompts[i // 4], [batch.responses[i]])])) for i in range(8)]
    assert_same(together.logprobs, torch.cat([one.logprobs for one in alone]))


@pytest.mark.parametrize("lora", [None, Lora(rank=4), Lora(rank=4, use_dora=True)])
def test_gradient_checkpointing_changes_nothing(lora: Lora | None, tiny_model: Path, tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        trainer = build(tiny_model, tmp_path, lora=lora, gradient_checkpointing=checkpointing, **options_of("ppo"))
        torch.manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        results.append(gradients(trainer, make_batch(trainer.model))[0])
    assert_same(*results)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_seed_gives_the_same_weights(algorithm: str, tiny_model: Path, tmp_path: Path) -> None:
    hashes, rows = set(), []
    for _ in range(2):
        trainer = build(tiny_model, tmp_path, lora=Lora(rank=4), minibatches=2, epochs=2, **options_of(algorithm))
        batch = make_batch(trainer.model)
        rows.append([trainer.update(batch, step) for step in range(3)])
        tensors = trainer.model.payload(torch.float32).tensors
        hashes.add(hashlib.sha256(b"".join(one.numpy().tobytes() for one in tensors.values())).hexdigest())
    assert len(hashes) == 1
    assert rows[0] == rows[1]


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_critic_warm_up_leaves_the_policy_alone(lora: Lora | None, tiny_model: Path, tmp_path: Path) -> None:
    """Also where the critic is a head on the policy's own trunk, and with weight decay."""
    ppo = PpoSpec(critic=Critic(kind="valueHead", warmup_steps=1))
    trainer = build(tiny_model, tmp_path, lora=lora, algorithm="ppo", ppo=ppo, optimizer=Optimizer(weight_decay=0.1))
    before = {name: value.clone() for name, value in trainer.model.trained_state().items()}
    batch = make_batch(trainer.model)
    trainer.update(batch, 0)
    after = {name: value.clone() for name, value in trainer.model.trained_state().items()}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"value_head.weight", "value_head.bias"}
    trainer.update(batch, 1)
    later = trainer.model.trained_state()
    assert any(not torch.equal(after[name], later[name]) for name in later if not name.startswith("value_head"))


def test_an_update_that_leaves_the_trusted_region_is_not_made(tiny_model: Path, tmp_path: Path) -> None:
    """The first pass has ratio 1 and is made; the second sees how far it went, and is dropped with all after it."""
    options: dict[str, Any] = {
        "epochs": 4,
        "optimizer": Optimizer(learning_rate=0.05, schedule="constant", warmup_ratio=0),
    }
    free = build(tiny_model, tmp_path, **options, **options_of("grpo"))
    assert free.update(make_batch(free.model), 0)["updates"] == 4
    careful = build(tiny_model, tmp_path, stop_kl=1e-6, **options, **options_of("grpo"))
    one = build(tiny_model, tmp_path, **{**options, "epochs": 1}, **options_of("grpo"))
    batch = make_batch(one.model)
    assert careful.update(batch, 0)["updates"] == 1
    one.update(batch, 0)
    assert_same(careful.model.trained_state(), one.model.trained_state())


def test_ptx_adds_the_gradient_of_the_language_model_loss(tiny_model: Path, tmp_path: Path) -> None:
    """grad(PPO-ptx) - grad(PPO) = coefficient * grad(mean negative log-likelihood), however it is cut up."""
    generator = np.random.default_rng(5)
    pair = (generator.integers(4, 260, 6).astype(np.int32), generator.integers(4, 260, 5).astype(np.int32))
    results = {}
    for name, ptx, budget in (("plain", 0.0, 4096), ("ptx", 0.7, 4096), ("pieces", 0.7, 1)):
        trainer = build(tiny_model, tmp_path, micro_batch_tokens=budget, **options_of("ppo", ptx_coefficient=ptx))
        trainer.demonstrations = [pair]
        batch = make_batch(trainer.model)
        results[name] = gradients(trainer, batch)[0]
    assert_same(results["ptx"], results["pieces"])
    model = build(tiny_model, tmp_path, **options_of("ppo")).model
    (-0.7 * model.logprobs(pack([(pair[0], [pair[1]])]), temperature=1.0).mean()).backward()
    expected = gradients_of(model)
    differences = {name: results["ptx"][name] - results["plain"][name] for name in expected}
    largest = max(float(one.abs().max()) for one in (*results["ptx"].values(), *expected.values()))
    assert_same(differences, expected, size=largest)


def test_the_adaptive_coefficient_follows_the_kl(tiny_model: Path, tmp_path: Path) -> None:
    adaptive = {"target": 1e-3, "horizon": 100}
    trainer = build(tiny_model, tmp_path, adaptive_kl=adaptive, kl_coefficient=0.1, **options_of("rloo"))
    batch = make_batch(trainer.model)
    far = replace(batch, ref_logprobs=batch.ref_logprobs - 1.0)
    assert trainer.update(far, 0)["kl_coefficient"] == 0.1
    # lm-human-preferences: the error is clipped at 0.2, and 12 samples of a horizon of 100 have passed.
    assert trainer.kl_controller.value == pytest.approx(0.1 * (1 + 0.2 * 12 / 100))


@pytest.mark.parametrize(
    ("schedule", "warmup", "progress", "factor"),
    [
        ("constant", 0.0, 0.5, 1.0),
        ("constant", 0.2, 0.1, 0.5),
        ("linear", 0.0, 0.25, 0.75),
        ("linear", 0.2, 0.2, 1.0),
        ("linear", 0.2, 0.6, 0.5),
        ("cosine", 0.2, 0.6, 0.5),
        ("cosine", 0.0, 1.0, 0.0),
        ("linear", 1.0, 1.0, 1.0),
    ],
)
def test_learning_rate(schedule: Any, warmup: float, progress: float, factor: float) -> None:
    options = Optimizer(schedule=schedule, warmup_ratio=warmup)
    assert learning_rate_factor(options, progress) == pytest.approx(factor)


def test_a_checkpoint_of_other_options_is_refused_in_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    from steersman.errors import FailedPreconditionError

    state = build(tiny_model, tmp_path, lora=Lora(rank=4), **options_of("grpo")).model.trained_state()
    other = build(tiny_model, tmp_path, lora=Lora(rank=8), **options_of("grpo")).model
    with pytest.raises(FailedPreconditionError, match="lora and critic options"):
        other.load_trained_state(state)


@pytest.mark.parametrize("algorithm", ["ppo", "nlpo"])
def test_resuming_equals_not_stopping(algorithm: str, tiny_model: Path, tmp_path: Path) -> None:
    options = {**options_of(algorithm), "adaptive_kl": {"target": 0.01, "horizon": 50}}
    unbroken = build(tiny_model, tmp_path / "a", lora=Lora(rank=4), **options)
    batches = [make_batch(unbroken.model, seed=seed) for seed in range(4)]
    for step, batch in enumerate(batches):
        unbroken.update(batch, step)
        if step == 1:
            unbroken.save(2, {})
    resumed = build(tiny_model, tmp_path / "a", lora=Lora(rank=4), **options)
    assert resumed.restore() == (2, [])
    for step, batch in enumerate(batches[2:], start=2):
        resumed.update(batch, step)
    assert resumed.kl_controller == unbroken.kl_controller
    for name, value in unbroken.model.trained_state().items():
        assert torch.equal(value, resumed.model.trained_state()[name]), name
