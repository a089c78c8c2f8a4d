"""A stage makes no step at rate 0, and one that learned nothing says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from safetensors.torch import load_file
from stage_context import Recorder

from steersman.config.manifest import Generation, KtoStage, Lora, Optimizer, RewardModelStage, SftStage
from steersman.errors import FailedPreconditionError
from training.context import StageContext
from training.offline.kto import run_kto
from training.offline.reward_model import run_reward_model
from training.offline.sft import run_sft
from training.offline.trl_setup import what_was_not_learned
from training.online.rollout import warn_of_cut_answers
from training.schedule import factor_of_step

TURNS = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "blue"}]
PAIR = {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "no"}]}
OPTIONS = {"lora": Lora(rank=2), "max_length": 128}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_no_step_has_rate_0(schedule: str, warmup: float, steps: int) -> None:
    options = Optimizer(schedule=schedule, warmup_ratio=warmup)  # type: ignore[arg-type]
    factors = [factor_of_step(options, step, steps) for step in range(steps + 1)]
    assert min(factors) > 0
    assert max(factors) <= 1


@pytest.mark.parametrize("stage", ["sft", "reward model"])
def test_ten_rows_make_one_step_that_changes_weights_and_that_is_called_few(
    make_context: Callable[..., StageContext], stage: str
) -> None:
    if stage == "sft":
        context = make_context("demonstrations", [{"messages": TURNS}] * 10)
        run_sft(SftStage(**OPTIONS), context)
    else:
        context = make_context("preferences", [PAIR] * 10)
        run_reward_model(RewardModelStage(**OPTIONS), context)
    adapter = load_file(context.stage_dir / "adapter" / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in adapter.items() if "lora_B" in name)
    assert isinstance(context.reporter, Recorder)
    rates = [metrics["learning_rate"] for _, _, metrics in context.reporter.steps if "learning_rate" in metrics]
    assert len(rates) == 1
    assert rates[0] > 0
    assert any("10 rows made 1 optimizer step, too few to learn much from" in note for note in context.reporter.notes)


def test_a_stage_that_changes_no_weight_fails(make_context: Callable[..., StageContext]) -> None:
    """A learning rate that vanishes beside the weights."""
    context = make_context("demonstrations", [{"messages": TURNS}] * 16)
    spec = SftStage(lora=None, max_length=128, optimizer=Optimizer(learning_rate=1e-30))
    with pytest.raises(FailedPreconditionError, match="has changed no weight"):
        run_sft(spec, context)
    assert not (context.stage_dir / "model").exists()


def test_a_stage_whose_loss_stays_says_so(make_context: Callable[..., StageContext]) -> None:
    rows = [{"prompt": TURNS[:1], "completion": TURNS[1:], "label": label} for label in (True, False)] * 20
    context = make_context("feedback", rows)
    run_kto(KtoStage(**OPTIONS, batch_size=4, micro_batch_size=4, optimizer=Optimizer(learning_rate=1e-9)), context)
    assert isinstance(context.reporter, Recorder)
    assert any("the loss did not fall (0.5 at the start, 0.5 at the end)" in note for note in context.reporter.notes)


def test_a_falling_loss_is_no_reason_to_warn() -> None:
    assert what_was_not_learned([{"loss": 2.0 - step / 10} for step in range(10)], 100) == []
    assert what_was_not_learned([], 100) == []
    # A loss may be negative, and falls then away from 0.
    assert what_was_not_learned([{"loss": -1.0 - step / 10} for step in range(10)], 100) == []


def test_answers_that_are_all_cut_short_are_said() -> None:
    reporter = Recorder()
    warn_of_cut_answers(0.5, Generation(), reporter)
    assert not reporter.notes
    warn_of_cut_answers(1.0, Generation(), reporter)
    assert "100% of the answers were cut short at generation.maxNewTokens 48; raise it" in reporter.notes[0]
