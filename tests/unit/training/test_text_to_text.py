"""Encoder-decoders through the stages that learn from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_dpo_kto import pairs, thumbs
from test_sft import COLOURS, chats, stage
from transformers import AutoModelForSeq2SeqLM

import training.offline.trl_setup
from steersman.artifacts import manifest_of_hashes
from steersman.config.manifest import DpoStage, KtoStage, Lora, Optimizer
from steersman.errors import ConfigError, DataError
from steersman.nn.load import load_tokenizer
from steersman.nn.tokens import IGNORE, prompt_ids
from steersman.testing.models import CHAT_TEMPLATE, save_model_folder, tiny_t5, tiny_tokenizer
from training.offline.dpo import run_dpo
from training.offline.kto import run_kto
from training.offline.sft import run_sft
from training.offline.text_to_text import _split


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    return save_model_folder(folder, tiny_t5(seed=3), tiny_tokenizer(chat_template=None))


def test_it_learns_to_answer_and_to_stop(make_context, monkeypatch, t5: Path) -> None:
    monkeypatch.setattr("training.offline.trl_setup.CHECKPOINT_SECONDS", float("inf"))
    context = make_context("demonstrations", chats(64), validation=chats(8, seed=2), model=t5)
    artifacts = run_sft(stage(epochs=8, optimizer=Optimizer(learning_rate=1e-2)), context)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(artifacts["model"]), load_tokenizer(artifacts["model"])
    for thing, colour in COLOURS.items():
        ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": thing}])])
        said = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, 1:])
        assert said == f"{colour}<|im_end|>"
    assert context.reporter.steps[-1][2]["eval_loss"] < 0.1


def test_micro_batches_of_any_size_give_the_same_weights(make_context, t5: Path) -> None:
    """A token counts the same in a long answer and in a short one, however they fall into micro-batches."""
    losses = []
    for micro in (8, 2):
        context = make_context("demonstrations", chats(32), model=t5)
        run_sft(stage(max_steps=3, micro_batch_size=micro), context)
        losses.append([metrics["loss"] for _, _, metrics in context.reporter.steps if "loss" in metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_a_killed_run_ends_with_the_same_weights(make_context, monkeypatch, t5: Path, lora: Lora | None) -> None:
    torch.set_num_threads(1)
    spec = stage(max_steps=4, lora=lora)
    unbroken = manifest_of_hashes(run_sft(spec, make_context("demonstrations", chats(16), model=t5))["model"])
    monkeypatch.setattr(training.offline.trl_setup, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training.offline.trl_setup, "CHECKPOINT_SHARE", float("inf"))
    context = make_context("demonstrations", chats(16), model=t5)

    class Killed(BaseException):
        pass

    def dies(step, total, **metrics):
        if step == 3:
            raise Killed

    monkeypatch.setattr(context.reporter, "step", dies)
    with pytest.raises(Killed):
        run_sft(spec, context)
    again = make_context("demonstrations", chats(16), model=t5)
    assert manifest_of_hashes(run_sft(spec, again)["model"]) == unbroken
    assert "continuing from checkpoint-2" in again.reporter.notes


def test_several_answers_in_a_row_are_refused(make_context, tmp_path: Path) -> None:
    assert _split({"input_ids": [5, 6, 2, 7, 2], "labels": [IGNORE, IGNORE, IGNORE, 7, 2]}) == {
        "input_ids": [5, 6, 2],
        "labels": [7, 2],
    }
    folder = save_model_folder(tmp_path / "chatml", tiny_t5(), tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    with pytest.raises(DataError, match="one answer behind one prompt"):
        run_sft(stage(max_steps=1), make_context("demonstrations", chats(8), model=folder))


def test_dpo_and_kto_are_refused_in_one_sentence(make_context, t5: Path) -> None:
    with pytest.raises(ConfigError, match="dpo trains decoders, and t5 is an encoder-decoder"):
        run_dpo(DpoStage(), make_context("preferences", pairs(8), model=t5))
    with pytest.raises(ConfigError, match="kto trains decoders, and t5 is an encoder-decoder"):
        run_kto(KtoStage(), make_context("feedback", thumbs(8), model=t5))
