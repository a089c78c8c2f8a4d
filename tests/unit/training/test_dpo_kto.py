"""DPO and its variants, and KTO, move the policy to what is preferred and stay near the reference."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from steersman.config.manifest import DpoStage, KtoStage, Lora, Optimizer
from steersman.errors import ConfigError, DataError
from steersman.nn.load import load_causal_lm, load_tokenizer
from steersman.nn.tokens import answer_ids, prompt_ids
from training.offline.dpo import preference_dataset, run_dpo
from training.offline.kto import feedback_dataset, run_kto

WORDS = ["red", "blue", "green", "tin"]


def pairs(count: int, seed: int = 1) -> list[dict]:
    draw = random.Random(seed)
    return [
        {
            "prompt": [{"role": "user", "content": draw.choice(WORDS)}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no!"}],
        }
        for _ in range(count)
    ]


def thumbs(count: int, seed: int = 1) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        up = number % 2 == 0
        rows.append(
            {
                "prompt": [{"role": "user", "content": draw.choice(WORDS)}],
                "completion": [{"role": "assistant", "content": "yes" if up else "no!"}],
                "label": up,
            }
        )
    return rows


def logprob(model, tokenizer, answer: str) -> float:
    """Log-probability of the whole answer, end token included, by a plain forward pass."""
    prompt = [{"role": "user", "content": "red"}]
    said = answer_ids(tokenizer, prompt, {"role": "assistant", "content": answer}, [2])
    return response_logprob(model, prompt_ids(tokenizer, prompt), said)


def response_logprob(model, prompt: list[int], response: list[int]) -> float:
    """Log-probability of a response in tokens, in nats."""
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))


def preference_gain(folder, base_model) -> float:
    """How much further 'yes' is ahead of 'no!' than in the reference, in nats."""
    tokenizer = load_tokenizer(base_model)
    gaps = [
        logprob(model, tokenizer, "yes") - logprob(model, tokenizer, "no!")
        for model in (AutoModelForCausalLM.from_pretrained(folder), load_causal_lm(base_model))
    ]
    return gaps[0] - gaps[1]


OPTIONS = {"max_steps": 12, "batch_size": 8, "micro_batch_size": 4, "max_length": 256}


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "robust", "hinge"])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_dpo_prefers_what_is_preferred(make_context, base_model, loss, lora):
    spec = DpoStage(
        loss=loss,
        lora=lora,
        label_smoothing=0.1 if loss == "robust" else 0.0,
        optimizer=Optimizer(learning_rate=1e-2 if lora else 3e-3),
        **OPTIONS,
    )
    context = make_context("preferences", pairs(32), validation=pairs(8, seed=2))
    artifacts = run_dpo(spec, context)
    assert preference_gain(artifacts["model"], base_model) > 2.0
    first = context.reporter.steps[0][2]
    # Before the first step policy and reference are the same, so every log-ratio is 0.
    start = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * 0.1) ** 2}[loss]
    assert first["loss"] == pytest.approx(start, abs=1e-3)
    assert context.reporter.steps[-1][2]["eval_rewards/accuracies"] == 1.0


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


BETA, FLIPPED, TOKENS = 0.1, 0.2, 4
"""Both answers are three letters and the end token."""
EQUATIONS = {
    "sigmoid": lambda d: -log_sigmoid(BETA * d),
    "ipo": lambda d: (d / TOKENS - 1 / (2 * BETA)) ** 2,
    "hinge": lambda d: max(0.0, 1 - BETA * d),
    "robust": lambda d: -((1 - FLIPPED) * log_sigmoid(BETA * d) - FLIPPED * log_sigmoid(-BETA * d)) / (1 - 2 * FLIPPED),
}


@pytest.mark.parametrize("loss", EQUATIONS)
def test_dpo_loss_equals_the_equation(make_context, base_model, loss):
    """Steps on one pair: the loss at step 2 by hand from the weights after step 1."""
    spec = DpoStage(
        loss=loss,
        beta=BETA,
        label_smoothing=FLIPPED if loss == "robust" else 0.0,
        lora=None,
        optimizer=Optimizer(learning_rate=1e-3, schedule="constant", warmup_ratio=0),
        **{**OPTIONS, "batch_size": 2, "micro_batch_size": 2, "max_steps": 2},
    )
    same = pairs(1) * 4
    for row in same:
        row["prompt"][0]["content"] = "red"
    context = make_context("preferences", same)
    run_dpo(spec.model_copy(update={"max_steps": 1}), context)
    gain = preference_gain(context.stage_dir / "model", base_model)
    assert gain > 0.1
    context = make_context("preferences", same)
    run_dpo(spec, context)
    losses = [metrics["loss"] for _, _, metrics in context.reporter.steps if "loss" in metrics]
    assert losses[1] == pytest.approx(EQUATIONS[loss](gain), abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "flipped", "optimum"),
    [("sigmoid", 2, math.log(3) / 0.5), ("ipo", 0, TOKENS / (2 * 0.5))],
    ids=["sigmoid", "ipo"],
)
def test_dpo_reaches_the_optimum_of_its_loss(make_context, base_model, loss, flipped, optimum):
    """Where 2 of 8 labelers disagree, sigma(beta d) = 3/4 is best; IPO's best d is 1 / (2 beta) a token."""
    rows = pairs(8)
    for number, row in enumerate(rows):
        row["prompt"][0]["content"] = "red"
        if number < flipped:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    rates = Optimizer(learning_rate=3e-3, schedule="linear", warmup_ratio=0)
    spec = DpoStage(loss=loss, beta=0.5, lora=None, optimizer=rates, **{**OPTIONS, "max_steps": 40})
    artifacts = run_dpo(spec, make_context("preferences", rows))
    assert preference_gain(artifacts["model"], base_model) == pytest.approx(optimum, rel=0.05)


def test_kto_loss_equals_the_equation(make_context, base_model):
    """As above; every batch holds all rows, so the mismatched answers are as often the good as the bad one."""
    spec = KtoStage(
        lora=None,
        optimizer=Optimizer(learning_rate=1e-3, schedule="constant", warmup_ratio=0),
        desirable_weight=1.5,
        undesirable_weight=0.5,
        **{**OPTIONS, "micro_batch_size": 8, "max_steps": 2},
    )
    rows = thumbs(8)
    for row in rows:
        row["prompt"][0]["content"] = "red"
    context = make_context("feedback", rows)
    run_kto(spec.model_copy(update={"max_steps": 1}), context)
    tokenizer = load_tokenizer(base_model)
    after, before = load_causal_lm(context.stage_dir / "model"), load_causal_lm(base_model)
    up, down = (logprob(after, tokenizer, said) - logprob(before, tokenizer, said) for said in ("yes", "no!"))
    z = max(0.0, (up + down) / 2)
    good = 1.5 * (1 - math.exp(log_sigmoid(0.1 * (up - z))))
    bad = 0.5 * (1 - math.exp(log_sigmoid(0.1 * (z - down))))
    context = make_context("feedback", rows)
    run_kto(spec, context)
    losses = [metrics["loss"] for _, _, metrics in context.reporter.steps if "loss" in metrics]
    assert abs(losses[1] - losses[0]) > 1e-3
    assert losses[1] == pytest.approx((good + bad) / 2, abs=1e-4)


def test_kto_padding_changes_nothing(make_context, base_model):
    """Rows of very different length in one batch against forward passes of single rows, mismatched ones as well."""
    options = {**OPTIONS, "micro_batch_size": 8}
    spec = KtoStage(lora=None, optimizer=Optimizer(learning_rate=1e-3, schedule="constant", warmup_ratio=0), **options)
    rows = thumbs(8)
    for number, row in enumerate(rows):
        row["prompt"][0]["content"] = "hm " * number + "red"
        row["completion"][0]["content"] += "!" * (7 - number)
    context = make_context("feedback", rows)
    run_kto(spec.model_copy(update={"max_steps": 1}), context)
    after, before = load_causal_lm(context.stage_dir / "model"), load_causal_lm(base_model)
    data = feedback_dataset(context.files("feedback").train, load_tokenizer(base_model), [2], 256, 8, context.seed)

    def gains(answers: str) -> torch.Tensor:
        return torch.tensor(
            [
                response_logprob(after, row["prompt_ids"], row[answers])
                - response_logprob(before, row["prompt_ids"], row[answers])
                for row in data
            ]
        )

    signs = torch.tensor([1.0 if row["label"] else -1.0 for row in data])
    z = gains("KL_completion_ids").mean().clamp(min=0)
    expected = (1 - torch.sigmoid(0.1 * signs * (gains("completion_ids") - z))).mean().item()
    context = make_context("feedback", rows)
    run_kto(spec.model_copy(update={"max_steps": 2}), context)
    losses = [metrics["loss"] for _, _, metrics in context.reporter.steps if "loss" in metrics]
    assert abs(losses[1] - losses[0]) > 1e-3
    assert losses[1] == pytest.approx(expected, abs=1e-4)


def test_micro_batches_change_nothing(make_context):
    """Pairs of very different length; KTO is left out, whose KL is that of a micro-batch."""
    rows = pairs(8)
    for number, row in enumerate(rows):
        row["prompt"][0]["content"] = "hm " * number + "red"
        row["rejected"][0]["content"] += "!" * number
    weights = []
    for micro in (8, 2):
        options = {**OPTIONS, "max_steps": 3, "micro_batch_size": micro}
        spec = DpoStage(lora=None, optimizer=Optimizer(learning_rate=1e-3), **options)
        weights.append(load_file(run_dpo(spec, make_context("preferences", rows))["model"] / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_kto_follows_the_thumbs(make_context, base_model, lora):
    spec = KtoStage(lora=lora, optimizer=Optimizer(learning_rate=1e-2 if lora else 3e-3), **OPTIONS)
    context = make_context("feedback", thumbs(32))
    artifacts = run_kto(spec, context)
    assert preference_gain(artifacts["model"], base_model) > 2.0
    # Before the first step every reward and the KL are 0: 1 - sigmoid(0).
    assert context.reporter.steps[0][2]["loss"] == pytest.approx(0.5, abs=1e-3)


def test_tokens_end_with_the_end_token(make_context, base_model):
    context = make_context("preferences", pairs(2))
    tokenizer = load_tokenizer(base_model)
    rows = preference_dataset(context.files("preferences").train, tokenizer, [2], 256)
    assert tokenizer.decode(rows[0]["chosen_ids"]) == "yes<|im_end|>"
    assert tokenizer.decode(rows[0]["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_kto_mismatches_within_each_micro_batch(make_context, base_model):
    rows = thumbs(6)
    for number, row in enumerate(rows):
        row["completion"][0]["content"] += str(number)
    context = make_context("feedback", rows)
    tokenizer = load_tokenizer(base_model)
    data = feedback_dataset(context.files("feedback").train, tokenizer, [2], 256, 3, 17)
    answers = data["completion_ids"]
    assert data["KL_completion_ids"] == [answers[2], *answers[:2], answers[5], *answers[3:5]]
    assert sorted(map(json.dumps, answers)) == sorted(
        json.dumps(answer_ids(tokenizer, row["prompt"], row["completion"][0], [2])) for row in rows
    )


def test_kto_needs_mismatched_rows_and_both_thumbs(make_context):
    context = make_context("feedback", thumbs(4))
    with pytest.raises(ConfigError, match="microBatchSize must be at least 2"):
        run_kto(KtoStage(micro_batch_size=1), context)
    context = make_context("feedback", [row for row in thumbs(8) if row["label"]])
    with pytest.raises(DataError, match="every label is True"):
        run_kto(KtoStage(), context)


def test_a_too_long_pair_is_named(make_context):
    rows = pairs(3)
    rows[1]["rejected"][0]["content"] = "no " * 100
    with pytest.raises(DataError, match=r"preferences\.train\.jsonl:2: \d+ tokens"):
        run_dpo(DpoStage(max_length=128), make_context("preferences", rows))


def test_an_answer_of_several_turns_is_named(make_context):
    rows = pairs(2)
    rows[1]["chosen"] = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    with pytest.raises(DataError, match=r"jsonl:2: an answer of 3 turns"):
        run_dpo(DpoStage(), make_context("preferences", rows))
