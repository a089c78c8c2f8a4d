"""DPO and its variants, and KTO, move the policy to what is preferred and stay near the reference."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from steersman.config.manifest import DpoStage, KtoStage, Lora, Optimizer
from steersman.errors import ConfigError, DataError
from steersman.nn.load import load_causal_lm, load_tokenizer
from steersman.nn.tokens import answer_ids, prompt_ids
from training.dpo import preference_dataset, run_dpo
from training.kto import feedback_dataset, run_kto

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
    before = prompt_ids(tokenizer, prompt)
    after = answer_ids(tokenizer, prompt, {"role": "assistant", "content": answer}, [2])
    with torch.no_grad():
        logprobs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(logprobs[len(before) - 1 + i, token].item() for i, token in enumerate(after))


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


def test_dpo_loss_equals_the_equation(make_context, base_model):
    """One step on one pair: the loss at step 2 by hand from the weights after step 1."""
    spec = DpoStage(lora=None, optimizer=Optimizer(learning_rate=1e-3, schedule="constant", warmup_ratio=0), **OPTIONS)
    spec = spec.model_copy(update={"max_steps": 2, "batch_size": 2, "micro_batch_size": 2})
    same = pairs(1) * 4
    for row in same:
        row["prompt"][0]["content"] = "red"
    context = make_context("preferences", same)
    run_dpo(spec.model_copy(update={"max_steps": 1}), context)
    gain = preference_gain(context.stage_dir / "model", base_model)
    context = make_context("preferences", same)
    run_dpo(spec, context)
    losses = [metrics["loss"] for _, _, metrics in context.reporter.steps if "loss" in metrics]
    assert losses[1] == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * gain))), abs=1e-4)


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
