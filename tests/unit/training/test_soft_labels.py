"""A tie trains as a tie, and the losses are TRL's where everybody agrees."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from steersman.config.manifest import DpoStage, Optimizer, RewardModelStage
from steersman.nn.load import load_causal_lm, load_tokenizer
from steersman.nn.parity import skip_padding
from training.context import StageContext
from training.mathematics.preference_losses import preference_loss
from training.mathematics.reward_losses import binary_loss, pairwise_loss
from training.offline.dpo import PreferenceTrainer, preference_dataset, run_dpo
from training.offline.reward_data import RewardData
from training.offline.reward_model import run_reward_model

BETA, SMOOTHING = 0.3, 0.1
CHOSEN, REJECTED = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
LENGTHS = (torch.tensor([4.0, 2.0, 5.0]), torch.tensor([3.0, 2.0, 1.0]))


def loss_of(
    kind: Any, soft: float | None, chosen: torch.Tensor = CHOSEN, rejected: torch.Tensor = REJECTED
) -> torch.Tensor:
    return preference_loss(
        kind, chosen, rejected, beta=BETA, smoothing=SMOOTHING if kind == "robust" else 0.0, lengths=LENGTHS,
        soft_label=None if soft is None else torch.full((3,), soft),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "robust"])
def test_a_pair_counts_by_how_many_preferred_it(kind: Any) -> None:
    hard, turned = loss_of(kind, None), loss_of(kind, 0.0)
    torch.testing.assert_close(loss_of(kind, 1.0), hard)
    torch.testing.assert_close(loss_of(kind, 0.25), 0.25 * hard + 0.75 * turned)
    # Of a tie the best difference is none.
    difference = torch.zeros(3, requires_grad=True)
    loss_of(kind, 0.5, difference, torch.zeros(3)).sum().backward()
    torch.testing.assert_close(difference.grad, torch.zeros(3))


def test_preference_losses_by_hand() -> None:
    d = 1.0
    assert loss_of("sigmoid", None)[0].item() == pytest.approx(math.log(1 + math.exp(-BETA * d)))
    assert loss_of("hinge", None)[0].item() == pytest.approx(1 - BETA * d)
    assert loss_of("ipo", None)[0].item() == pytest.approx((1 / 4 - 0 / 3 - 1 / (2 * BETA)) ** 2)
    # A known share of flipped labels is label smoothing, which TRL's sigmoid leaves out.
    smoothed = preference_loss("sigmoid", CHOSEN, REJECTED, beta=BETA, smoothing=0.2)
    torch.testing.assert_close(smoothed, loss_of("sigmoid", 0.8))


def test_pairwise_and_binary_losses_by_hand() -> None:
    soft = torch.tensor([1.0, 0.5, 0.25])
    loss, _ = pairwise_loss(CHOSEN, REJECTED, denominator=3, soft_label=soft)
    expected = [-math.log(1 / (1 + math.exp(-d))) * s - math.log(1 / (1 + math.exp(d))) * (1 - s)
                for d, s in zip((1.0, -3.0, 0.0), soft.tolist(), strict=True)]  # fmt: skip
    assert loss.item() == pytest.approx(sum(expected) / 3)
    margin = torch.tensor([0.5, 0.5, 0.5])
    plain, _ = pairwise_loss(CHOSEN, REJECTED, denominator=3, margin=margin)
    same, _ = pairwise_loss(CHOSEN, REJECTED, denominator=3, margin=margin, soft_label=torch.ones(3))
    assert same.item() == pytest.approx(plain.item())
    half, _ = binary_loss(torch.tensor([2.0]), torch.tensor([0.5]), denominator=1)
    assert half.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2)


def pairs(*soft: float | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, share in enumerate(soft):
        row: dict[str, Any] = {
            "prompt": [{"role": "user", "content": "hm " * number + "red"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no, never"}],
        }
        rows.append(row if share is None else {**row, "margin": 0.0, "soft_label": share})
    return rows


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "robust"])
def test_a_step_equals_trls_where_everybody_agrees(
    make_context: Callable[..., StageContext], tmp_path: Any, kind: Any
) -> None:
    """One batch through TRL's own loss, padded, and through ours, packed: loss and gradients."""
    context = make_context("preferences", pairs(None, 1.0, None))
    tokenizer = load_tokenizer(context.policy_model)
    data = preference_dataset(context.files("preferences").train, tokenizer, [2], 256)
    spec = DpoStage(loss=kind, beta=BETA, label_smoothing=SMOOTHING if kind == "robust" else 0.0)
    arguments = DPOConfig(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[], max_length=None, loss_type=[kind], beta=BETA,
        label_smoothing=spec.label_smoothing, gradient_checkpointing=False, remove_unused_columns=False,
    )  # fmt: skip

    def step(make: Any, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model, reference = load_causal_lm(context.policy_model), load_causal_lm(context.policy_model)
        with torch.no_grad():  # away from the reference, so that the difference is not 0
            model.lm_head.weight.add_(0.05 * torch.randn(model.lm_head.weight.shape))
        if make is PreferenceTrainer:
            skip_padding(model)
            skip_padding(reference)
        trainer = make(
            model=model, ref_model=reference, args=arguments, train_dataset=data, processing_class=tokenizer, **options
        )
        batch = trainer.data_collator([data[index] for index in range(len(data))])
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        return loss.item(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    class Plain(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    expected, gradients = step(Plain)
    actual, ours = step(PreferenceTrainer, spec=spec)
    assert actual == pytest.approx(expected, abs=1e-5)
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_ties_leave_the_policy_where_it_is(make_context: Callable[..., StageContext]) -> None:
    """As hard preferences the same rows would move it by nats; half and half they only hold it to the reference."""
    spec = DpoStage(lora=None, batch_size=8, micro_batch_size=8, max_steps=12, max_length=256,
                    optimizer=Optimizer(learning_rate=3e-3))  # fmt: skip
    context = make_context("preferences", pairs(*[0.5] * 8))
    run_dpo(spec, context)
    margins = [m["rewards/margins"] for _, _, m in context.reporter.steps if "rewards/margins" in m]  # type: ignore[attr-defined]
    assert abs(margins[-1]) < 0.02
    assert any("the data asks for no change" in note for note in context.reporter.notes)  # type: ignore[attr-defined]
    context = make_context("preferences", pairs(*[None] * 8))
    run_dpo(spec, context)
    margins = [m["rewards/margins"] for _, _, m in context.reporter.steps if "rewards/margins" in m]  # type: ignore[attr-defined]
    assert margins[-1] > 1


@pytest.mark.parametrize("objective", ["pairwise", "binary"])
def test_a_reward_model_gives_both_sides_of_a_tie_the_same(
    make_context: Callable[..., StageContext], objective: Any
) -> None:
    spec = RewardModelStage(
        objective=objective, lora=None, batch_size=8, micro_batch_size=8, max_steps=30, max_length=256,
        optimizer=Optimizer(learning_rate=2e-3),
    )  # fmt: skip
    context = make_context("preferences", pairs(*[0.5] * 8))
    data = RewardData(spec, load_tokenizer(context.policy_model))
    assert data.pairs(context.files("preferences").train)["soft_label"] == [0.5] * 8
    run_reward_model(spec, context)
    losses = [m["loss"] for _, _, m in context.reporter.steps if "loss" in m]  # type: ignore[attr-defined]
    assert losses[-1] == pytest.approx(math.log(2), abs=0.03)


def test_held_out_ties_have_no_right_side(make_context: Callable[..., StageContext]) -> None:
    spec = RewardModelStage(lora=None, batch_size=8, micro_batch_size=8, max_steps=5, max_length=256)
    context = make_context("preferences", pairs(*[None] * 8), heldout=pairs(0.5, None, 0.5))
    assert len(json.loads(run_reward_model(spec, context)["evaluation"].read_text())["pairs"]) == 1
    context = make_context("preferences", pairs(*[None] * 8), heldout=pairs(0.5, 0.5))
    assert "pairs" not in json.loads(run_reward_model(spec, context)["evaluation"].read_text())
