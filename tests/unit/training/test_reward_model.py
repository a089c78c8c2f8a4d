"""Reward models learn what is preferred, in every objective, and score later as they did when they were measured."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import Linear
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from steersman.config.manifest import Lora, Optimizer, RewardModelStage
from steersman.errors import DataError
from steersman.nn import load
from steersman.nn.load import load_reward_backbone, load_reward_model
from steersman.nn.tokens import conversation_parts
from steersman.testing.models import save_model_folder, tiny_llama, tiny_roberta_reward, tiny_tokenizer
from training.mathematics.reward_losses import pairwise_loss
from training.offline import reward_model
from training.offline.reward_evaluation import ScoredPair, evaluate_pairs
from training.offline.reward_model import run_reward_model

WORDS = ["red", "blue", "green", "tin", "oak", "sun"]


def pairs(count: int, seed: int) -> list[dict]:
    """The answer that says 'yes' is preferred; both answers have the same length."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        word, other = draw.choice(WORDS), draw.choice(WORDS)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{word}?"}],
                "chosen": [{"role": "assistant", "content": f"yes {other}"}],
                "rejected": [{"role": "assistant", "content": f"no! {other}"}],
                "margin": float(draw.choice([1, 2, 3])),
            }
        )
    return rows


def rated(count: int, seed: int) -> list[dict]:
    """Helpfulness 5 for 'yes' and 1 for 'no!', tone 2 or 4 by the second word; some ratings are missing."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        answer, word = draw.choice(["yes", "no!"]), draw.choice(["red", "tin"])
        aspects = {"helpfulness": 5.0 if answer == "yes" else 1.0, "tone": 4.0 if word == "red" else 2.0}
        if draw.random() < 0.2:
            aspects.pop("tone")
        rows.append(
            {
                "prompt": [{"role": "user", "content": "so?"}],
                "completion": [{"role": "assistant", "content": f"{answer} {word}"}],
                "aspects": aspects,
            }
        )
    return rows


def stage(**values) -> RewardModelStage:
    defaults = {"lora": Lora(rank=4), "optimizer": Optimizer(learning_rate=1e-2), "max_steps": 25, "batch_size": 8}
    return RewardModelStage(**{**defaults, "micro_batch_size": 8, "max_length": 256, **values})


@pytest.mark.parametrize("objective", ["pairwise", "binary"])
@pytest.mark.parametrize("lora", [Lora(rank=4), None], ids=["lora", "full"])
def test_learns_the_preference(make_context, objective, lora):
    context = make_context("preferences", pairs(64, 1), validation=pairs(16, 2), heldout=pairs(32, 3))
    rate = Optimizer(learning_rate=5e-3)
    spec = stage(objective=objective, lora=lora, margin=objective == "pairwise", max_steps=60, optimizer=rate)
    artifacts = run_reward_model(spec, context)
    evaluation = json.loads(artifacts["evaluation"].read_text())
    assert evaluation["accuracy"][0] == 1.0
    assert evaluation["longer_wins"] == evaluation["shorter_wins"] == 0.5
    assert sum(group["pairs"] for group in evaluation["by_margin"]) == len(evaluation["pairs"]) == 32
    assert len(artifacts["predictions"].read_text().splitlines()) == 32
    losses = [metrics["loss"] for _, _, metrics in context.reporter.steps if "loss" in metrics]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_in_bf16_frozen_weights_are_rounded_once_with_the_same_result(make_context, monkeypatch):
    found = []
    for rounds in (True, False):
        if not rounds:
            monkeypatch.setattr(reward_model, "round_frozen_products", lambda model: None)
            monkeypatch.setattr(load, "round_products", lambda model: None)
        context = replace(make_context("preferences", pairs(16, 1), validation=pairs(8, 2)), precision="bf16")
        artifacts = run_reward_model(stage(max_steps=2), context)
        model = load_reward_model(artifacts["model"], precision="bf16")
        kept = {type(one).__name__: one.weight.dtype for one in model.members[0].modules() if isinstance(one, Linear)}
        assert kept == {"Linear": torch.bfloat16 if rounds else torch.float32, "_Fp32Linear": torch.float32}
        losses = [metrics["loss"] for _, _, metrics in context.reporter.steps if "loss" in metrics]
        found.append((losses, json.loads(artifacts["evaluation"].read_text())["pairs"]))
        shutil.rmtree(context.stage_dir)
    assert found[0] == found[1]


def test_the_service_scores_as_training_measured(make_context):
    context = make_context("preferences", pairs(64, 1), validation=pairs(32, 2), heldout=pairs(32, 3))
    artifacts = run_reward_model(stage(max_steps=10), context)
    model = load_reward_model(artifacts["model"])
    rows = pairs(32, 3)
    rewards = [model.score([model.encode(row["prompt"] + row["chosen"])]).reward.item() for row in rows]
    measured = [pair["chosen"] for pair in json.loads(artifacts["evaluation"].read_text())["pairs"]]
    np.testing.assert_allclose(rewards, measured, atol=1e-4)

    reference = [model.encode(row["prompt"] + row[side]) for row in pairs(32, 2) for side in ("chosen", "rejected")]
    scores = model.score(reference).reward
    assert abs(scores.mean()) < 1e-3
    assert scores.std() == pytest.approx(1, abs=1e-3)

    # transformers alone reads the same score from the folder, padding included.
    plain = AutoModelForSequenceClassification.from_pretrained(artifacts["model"])
    tokenizer = AutoTokenizer.from_pretrained(artifacts["model"], padding_side="right")
    batch = tokenizer.pad([{"input_ids": ids} for ids in reference[:4]], return_tensors="pt")
    with torch.no_grad():
        raw = plain(**batch).logits[:, 0]
    settings = model.settings
    np.testing.assert_allclose((raw - settings.mean) / settings.std, scores[:4], atol=1e-4)


@pytest.mark.parametrize(("margin", "centering"), [(False, 0.0), (True, 0.0), (True, 0.2)])
def test_the_pairwise_loss_is_that_of_the_equation(make_context, margin, centering):
    """TRL's loss on four pairs beside `pairwise_loss`, whose golden values stand in test_reward_losses.py."""
    rows = pairs(4, 1)
    still = Optimizer(learning_rate=1e-12)  # so that what is saved is what the loss was computed from
    spec = stage(lora=None, optimizer=still, margin=margin, center_rewards=centering, max_steps=1, batch_size=4)
    context = make_context("preferences", rows)
    model = load_reward_model(run_reward_model(spec, context)["model"])
    chosen, rejected = (
        model.score([model.encode(row["prompt"] + row[side]) for row in rows]).members[0]
        for side in ("chosen", "rejected")
    )
    margins = torch.tensor([row["margin"] for row in rows]) if margin else None
    expected, _ = pairwise_loss(chosen, rejected, margin=margins, centering=centering, denominator=4)
    assert context.reporter.steps[0][2]["loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("objective", ["pairwise", "binary", "aspects"])
def test_micro_batches_change_nothing(make_context, objective):
    """Rows of very different length; some ratings of the aspects are missing, so micro-batches have unequal numbers."""
    rows = rated(8, 1) if objective == "aspects" else pairs(8, 1)
    for number, row in enumerate(rows):
        row["prompt"][0]["content"] = "hm " * number + row["prompt"][0]["content"]
    aspects = {"helpfulness": 0.75, "tone": 0.25} if objective == "aspects" else {}
    weights = []
    for micro in (8, 2):
        spec = stage(
            objective=objective, aspects=aspects, lora=None, optimizer=Optimizer(learning_rate=1e-3),
            max_steps=3, micro_batch_size=micro,
        )  # fmt: skip
        context = make_context("aspects" if aspects else "preferences", rows)
        weights.append(load_file(run_reward_model(spec, context)["model"] / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=2e-4, rtol=0, msg=name)


def test_padding_with_the_end_token_hides_nothing(make_context, tmp_path):
    folder = save_model_folder(tmp_path / "pad-is-eos", tiny_llama(), tiny_tokenizer(pad_is_eos=True))
    context = make_context("preferences", pairs(16, 1), model=folder)
    artifacts = run_reward_model(stage(max_steps=2), context)
    plain = AutoModelForSequenceClassification.from_pretrained(artifacts["model"])
    assert plain.config.pad_token_id != plain.config.eos_token_id
    model = load_reward_model(artifacts["model"])
    ids = model.encode([{"role": "user", "content": "red?"}, {"role": "assistant", "content": "yes"}])
    assert ids[-1] == plain.config.eos_token_id
    with torch.no_grad():
        hidden = plain.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        expected = plain.score(hidden)
    torch.testing.assert_close(model.score([ids, ids + ids]).members[0, :1], expected, atol=1e-5, rtol=0)


def test_aspects_come_back_in_the_unit_of_the_ratings(make_context):
    context = make_context("aspects", rated(96, 1), heldout=rated(32, 2))
    spec = stage(objective="aspects", aspects={"helpfulness": 0.75, "tone": 0.25}, lora=None, max_steps=60)
    artifacts = run_reward_model(spec, context)
    evaluation = json.loads(artifacts["evaluation"].read_text())["aspects"]
    assert evaluation["helpfulness"]["correlation"] > 0.9
    assert evaluation["tone"]["correlation"] > 0.9
    model = load_reward_model(artifacts["model"])
    ids = model.encode([{"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes red"}])
    scores = model.score([ids])
    assert scores.aspects[0].tolist() == pytest.approx([5, 4], abs=0.7)
    raw = 0.75 * scores.aspects[0, 0] + 0.25 * scores.aspects[0, 1]
    assert scores.members.item() == pytest.approx(raw.item(), abs=1e-4)

    backbone, head = load_reward_backbone(artifacts["model"])
    hidden = backbone.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    assert head(hidden).item() == pytest.approx(scores.reward.item(), abs=1e-4)


def test_an_encoder_with_its_own_tokenizer(make_context, tmp_path):
    folder = save_model_folder(tmp_path / "roberta", tiny_roberta_reward(), tiny_tokenizer(chat_template=None))
    context = make_context("preferences", pairs(64, 1), heldout=pairs(32, 3))
    artifacts = run_reward_model(stage(base=str(folder), max_steps=40), context)
    assert json.loads(artifacts["evaluation"].read_text())["accuracy"][0] > 0.9
    assert AutoModelForSequenceClassification.from_pretrained(artifacts["model"]).config.model_type == "roberta"


@pytest.mark.parametrize("mode", ["mean", "worst"])
def test_an_ensemble_combines_standardised_members(make_context, mode):
    context = make_context("preferences", pairs(32, 1), validation=pairs(16, 2))
    artifacts = run_reward_model(stage(ensemble=2, ensemble_mode=mode, max_steps=6), context)
    model = load_reward_model(artifacts["model"])
    first, second = model.settings.members
    scores = model.score([model.encode(row["prompt"] + row["chosen"]) for row in pairs(8, 5)])
    z = torch.stack([(scores.members[0] - first.mean) / first.std, (scores.members[1] - second.mean) / second.std])
    assert (scores.members[0] - scores.members[1]).abs().max() > 1e-4, "members must differ"
    expected = z.amin(0) if mode == "worst" else z.mean(0)
    torch.testing.assert_close(scores.reward, (expected - model.settings.mean) / model.settings.std)


@pytest.mark.parametrize("decoder", [True, False])
def test_scores_do_not_depend_on_batches_or_order(make_context, decoder, tmp_path):
    if decoder:
        from steersman.testing.models import tiny_llama_reward

        folder = save_model_folder(tmp_path / "rm", tiny_llama_reward(num_labels=1))
    else:
        folder = save_model_folder(tmp_path / "rm", tiny_roberta_reward(), tiny_tokenizer(chat_template=None))
    model = load_reward_model(folder)
    draw = random.Random(3)
    rows = [[draw.randrange(4, 260) for _ in range(draw.randrange(1, 30))] for _ in range(20)] + [[5] * 7, [5] * 9]
    alone = torch.cat([model.score([row]).reward for row in rows])
    together = model.score(rows, max_batch_tokens=64).reward
    backwards = model.score(rows[::-1]).reward.flip(0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(backwards, alone, atol=1e-5, rtol=0)


def test_conversations_end_with_the_end_of_the_answer():
    tokenizer = tiny_tokenizer()
    prompt, answer = conversation_parts(
        tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert tokenizer.decode(answer) == "b<|im_end|>"
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    bare = tiny_tokenizer(chat_template=None)
    prompt, answer = conversation_parts(bare, [{"role": "user", "content": "a"}])
    assert bare.decode(prompt) == "user: a<|im_end|>"
    assert answer == []


def test_a_missing_margin_is_named(make_context):
    rows = pairs(3, 1)
    del rows[1]["margin"]
    with pytest.raises(DataError, match=r"preferences\.train\.jsonl:2: margin is missing"):
        run_reward_model(stage(margin=True), make_context("preferences", rows))


def test_a_too_long_row_is_named(make_context):
    rows = pairs(3, 1)
    rows[2]["chosen"][0]["content"] = "long " * 100
    with pytest.raises(DataError, match=r"preferences\.train\.jsonl:3: \d+ tokens, but maxLength is 256"):
        run_reward_model(stage(), make_context("preferences", rows))


def test_an_unrated_aspect_is_named(make_context):
    spec = stage(objective="aspects", aspects={"humour": 1.0})
    with pytest.raises(DataError, match=r"no row rates the aspect 'humour'.*helpfulness, tone"):
        run_reward_model(spec, make_context("aspects", rated(4, 1)))


def test_evaluation_equals_hand_worked_numbers():
    pairs = [
        ScoredPair(chosen=1.0, rejected=0.0, raw_difference=2.0, chosen_length=5, rejected_length=3, margin=1.0),
        ScoredPair(chosen=0.0, rejected=1.0, raw_difference=-2.0, chosen_length=5, rejected_length=5, margin=1.0),
        ScoredPair(chosen=0.5, rejected=0.5, raw_difference=0.0, chosen_length=2, rejected_length=3, margin=2.0),
        ScoredPair(chosen=3.0, rejected=1.0, raw_difference=4.0, chosen_length=2, rejected_length=9, margin=2.0),
    ]
    result = evaluate_pairs(pairs)
    # 2 right, 1 wrong, 1 tie: 2.5 of 4. Wilson by hand: centre (p + z^2/2n) / (1 + z^2/n) with z = 1.95996.
    assert result["accuracy"] == pytest.approx([0.625, 0.21943, 0.90810], abs=1e-5)
    assert (result["longer_wins"], result["shorter_wins"]) == (0.375, 0.625)
    assert [(group["margin_from"], group["accuracy"][0]) for group in result["by_margin"]] == [(1.0, 0.5), (2.0, 0.75)]
    assert result["calibration"][0]["predicted"] == pytest.approx(0.5)
