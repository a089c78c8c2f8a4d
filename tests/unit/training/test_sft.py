"""SFT trains what the assistant says, and nothing else, and goes on where it was killed."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from numeric import assert_same
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import training.offline.trl_setup
from steersman.artifacts import manifest_of_hashes
from steersman.config.manifest import Lora, Optimizer, SftStage
from steersman.errors import DataError, FailedPreconditionError
from steersman.leaving import EXIT_CODE
from steersman.nn.load import load_causal_lm, load_tokenizer
from steersman.nn.parity import skip_padding
from steersman.nn.reward import pad_rows
from steersman.nn.tokens import prompt_ids
from steersman.testing.models import save_model_folder, tiny_llama, tiny_tokenizer
from training.offline.sft import labelled_dataset, run_sft
from training.offline.trl_setup import Progress, newest_checkpoint

COLOURS = {"sky": "blue", "grass": "green", "coal": "black"}


def chats(count: int, seed: int = 1) -> list[dict]:
    """Two turns each: the colour of a thing, then thanks."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        thing = draw.choice(sorted(COLOURS))
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": thing},
                    {"role": "assistant", "content": COLOURS[thing]},
                    {"role": "user", "content": "ok"},
                    {"role": "assistant", "content": "bye"},
                ]
            }
        )
    return rows


def stage(**values) -> SftStage:
    defaults = {"lora": None, "optimizer": Optimizer(learning_rate=3e-3), "batch_size": 8, "micro_batch_size": 4}
    return SftStage(**{**defaults, "max_length": 256, **values})


def answers(folder) -> dict[str, str]:
    """What a model folder says about every thing, until it stops."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = {}
    for thing in COLOURS:
        ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": thing}])])
        said[thing] = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    return said


def test_learns_to_answer_and_to_stop_and_an_adapter_learns_otherwise(make_context, monkeypatch):
    # On a slow machine the second stage would continue from the first one's checkpoint.
    monkeypatch.setattr("training.offline.trl_setup.CHECKPOINT_SECONDS", float("inf"))
    context = make_context("demonstrations", chats(64), validation=chats(8, seed=2))
    spec = stage(epochs=15, optimizer=Optimizer(learning_rate=1e-2))
    artifacts = run_sft(spec, context)
    assert answers(artifacts["model"]) == {thing: f"{colour}<|im_end|>" for thing, colour in COLOURS.items()}
    assert list(artifacts) == ["model"]
    steps = context.reporter.steps
    assert steps[-1][2]["eval_loss"] < 0.1
    assert [step for step, _, metrics in steps if "loss" in metrics] == list(range(1, 121))

    learned = artifacts["model"].rename(context.run_dir / "learned")
    # Words of letters that the base has learned: an adapter leaves the embedding, and so the other letters, as it is.
    for thing, colour in {"sky": "green", "grass": "black", "coal": "blue"}.items():
        monkeypatch.setitem(COLOURS, thing, colour)
    context = make_context("demonstrations", chats(64), validation=chats(8, seed=2), model=learned)
    artifacts = run_sft(spec.model_copy(update={"lora": Lora(rank=8)}), context)
    assert answers(artifacts["model"]) == {thing: f"{colour}<|im_end|>" for thing, colour in COLOURS.items()}
    assert context.reporter.steps[-1][2]["eval_loss"] < 0.1
    assert (artifacts["adapter"] / "adapter_model.safetensors").is_file()


def test_progress_is_the_reporters_alone(make_context, capfd):
    run_sft(stage(max_steps=2), make_context("demonstrations", chats(16)))
    assert capfd.readouterr() == ("", "")


class TestLoss:
    """The loss of TRL's trainer over our labels, beside the loss computed by hand."""

    @pytest.fixture
    def parts(self, make_context, base_model):
        context = make_context("demonstrations", chats(6))
        tokenizer = load_tokenizer(base_model)
        return labelled_dataset(context.files("demonstrations").train, tokenizer, [2], 256), tokenizer

    def loss(self, rows, tokenizer, base_model, tmp_path, labels=None):
        model = load_causal_lm(base_model)
        skip_padding(model)
        arguments = SFTConfig(
            output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[], max_length=None,
            gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        batch = trainer.data_collator([rows[index] for index in range(len(rows))])
        if labels is not None:
            batch["labels"] = labels(batch["labels"])
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        return loss.item(), model.model.embed_tokens.weight.grad

    def test_equals_the_hand_computed_loss(self, parts, base_model, tmp_path):
        rows, tokenizer = parts
        actual, gradient = self.loss(rows, tokenizer, base_model, tmp_path)
        model = load_causal_lm(base_model)
        ids, mask = pad_rows(rows["input_ids"], 3, "cpu")
        logprobs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        terms = [
            -logprobs[row, position - 1, label]
            for row, labels in enumerate(rows["labels"])
            for position, label in enumerate(labels)
            if label != -100
        ]
        expected = torch.stack(terms).mean()
        expected.backward()
        assert actual == pytest.approx(expected.item(), abs=1e-5)
        assert_same(gradient, model.model.embed_tokens.weight.grad)

    def test_only_answers_carry_loss(self, parts, base_model, tmp_path):
        rows, tokenizer = parts
        # 'blue', 'green' or 'black' and 'bye', each with its end token: nothing else.
        texts = [tokenizer.decode([label for label in labels if label != -100]) for labels in rows["labels"]]
        expected = [f"{row['messages'][1]['content']}<|im_end|>bye<|im_end|>" for row in chats(6)]
        assert texts == expected
        plain, _ = self.loss(rows, tokenizer, base_model, tmp_path)
        changed, _ = self.loss(
            rows, tokenizer, base_model, tmp_path, labels=lambda labels: labels.where(labels != 2, -100)
        )
        assert changed != plain, "the end tokens are not trained"


def test_the_head_runs_only_where_a_label_is(make_context, monkeypatch):
    projected: list[int] = []

    import trl.trainer.utils

    real = trl.trainer.utils._ChunkedLogProbFunction

    class Spy:
        @staticmethod
        def apply(hidden, *args):
            projected.append(hidden.shape[0])
            return real.apply(hidden, *args)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Spy)
    rows = chats(4)
    run_sft(stage(max_steps=1, batch_size=4), make_context("demonstrations", rows))
    labelled = sum(len(turn["content"]) + 1 for row in rows for turn in row["messages"] if turn["role"] == "assistant")
    assert projected == [labelled]


def test_sft_loss_equals_the_equation(make_context, base_model):
    """Mean of -log p over the assistant's tokens, by a plain forward of each row."""
    rows = chats(4)
    context = make_context("demonstrations", rows)
    run_sft(stage(batch_size=4, micro_batch_size=2, max_steps=1), context)
    model, tokenizer = load_causal_lm(base_model), load_tokenizer(base_model)
    terms: list[float] = []
    for row in labelled_dataset(context.files("demonstrations").train, tokenizer, [2], 256):
        with torch.no_grad():
            logprobs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        terms += [-logprobs[at - 1, label].item() for at, label in enumerate(row["labels"]) if label != -100]
    assert context.reporter.steps[0][2]["loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_padding_and_micro_batches_change_nothing(make_context):
    """Rows of very different length, in one micro-batch or in four, padded with EOS or not: the same weights."""
    rows = chats(12)
    for number, row in enumerate(rows):
        row["messages"][0]["content"] = "hm " * (number + 1) + row["messages"][0]["content"]
    weights = []
    for micro in (12, 3):
        artifacts = run_sft(
            stage(batch_size=12, micro_batch_size=micro, max_steps=3), make_context("demonstrations", rows)
        )
        weights.append(load_file(artifacts["model"] / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=2e-4, rtol=0, msg=name)


def test_gradient_checkpointing_changes_nothing(make_context):
    weights = []
    for checkpointing in (False, True):
        artifacts = run_sft(
            stage(max_steps=2, gradient_checkpointing=checkpointing, lora=Lora(rank=4)),
            make_context("demonstrations", chats(16)),
        )
        weights.append(load_file(artifacts["model"] / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_a_killed_run_ends_with_the_same_weights(make_context, monkeypatch, lora):
    torch.set_num_threads(1)
    spec = stage(max_steps=6, lora=lora)
    unbroken = manifest_of_hashes(run_sft(spec, make_context("demonstrations", chats(32)))["model"])

    monkeypatch.setattr(training.offline.trl_setup, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training.offline.trl_setup, "CHECKPOINT_SHARE", float("inf"))
    context = make_context("demonstrations", chats(32))

    class Killed(BaseException):
        pass

    def dies(step, total, **metrics):
        if step == 4:
            raise Killed

    monkeypatch.setattr(context.reporter, "step", dies)
    with pytest.raises(Killed):
        run_sft(spec, context)
    checkpoints = context.stage_dir / "checkpoints"
    assert newest_checkpoint(checkpoints).name == "checkpoint-3"
    (checkpoints / "checkpoint-9").mkdir()  # a writer that was killed: no state

    context = make_context("demonstrations", chats(32))
    artifacts = run_sft(spec, context)
    assert "continuing from checkpoint-3" in context.reporter.notes
    assert [step for step, _, metrics in context.reporter.steps if "loss" in metrics] == [4, 5, 6]
    assert manifest_of_hashes(artifacts["model"]) == unbroken


def test_a_run_that_is_asked_to_leave_saves_first_and_ends_with_the_same_weights(make_context, monkeypatch):
    """SIGTERM in step 3 of 6: it ends that step, writes it, and says 143."""
    torch.set_num_threads(1)
    spec = stage(max_steps=6)
    unbroken = manifest_of_hashes(run_sft(spec, make_context("demonstrations", chats(32)))["model"])
    context = make_context("demonstrations", chats(32))
    monkeypatch.setattr(training.offline.trl_setup, "asked", lambda: len(context.reporter.steps) >= 2)
    with pytest.raises(SystemExit) as left:
        run_sft(spec, context)
    assert left.value.code == EXIT_CODE
    assert newest_checkpoint(context.stage_dir / "checkpoints").name == "checkpoint-3"
    monkeypatch.undo()
    again = make_context("demonstrations", chats(32))
    assert manifest_of_hashes(run_sft(spec, again)["model"]) == unbroken
    assert "continuing from checkpoint-3" in again.reporter.notes


def test_a_too_long_conversation_is_named(make_context):
    rows = chats(3)
    rows[1]["messages"][0]["content"] = "long " * 100
    with pytest.raises(DataError, match=r"demonstrations\.train\.jsonl:2: \d+ tokens, but maxLength is 256"):
        run_sft(stage(), make_context("demonstrations", rows))


def test_a_row_without_an_answer_is_named(make_context):
    rows = chats(3)
    rows[2]["messages"] = rows[2]["messages"][:1]
    with pytest.raises(DataError, match=r"demonstrations\.train\.jsonl:3"):
        run_sft(stage(), make_context("demonstrations", rows))


def test_an_empty_file_is_named(make_context):
    with pytest.raises(DataError, match="the file is empty"):
        run_sft(stage(), make_context("demonstrations", []))


def test_a_loss_that_is_no_number_ends_the_stage(make_context):
    spec = stage(max_steps=20, optimizer=Optimizer(learning_rate=1e30, max_grad_norm=1e30, schedule="constant"))
    context = make_context("demonstrations", chats(16))
    with pytest.raises(FailedPreconditionError, match=r"lower optimizer\.learningRate"):
        run_sft(spec, context)


def test_pad_may_be_the_end_token(make_context, tmp_path):
    results = []
    for pad_is_eos in (False, True):
        folder = save_model_folder(tmp_path / f"m{pad_is_eos}", tiny_llama(), tiny_tokenizer(pad_is_eos=pad_is_eos))
        artifacts = run_sft(stage(max_steps=3), make_context("demonstrations", chats(16), model=folder))
        results.append(load_file(artifacts["model"] / "model.safetensors"))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-6, rtol=0, msg=name)


def test_checkpoints_become_rarer_when_they_take_long(make_context, monkeypatch):
    now = 0.0
    monkeypatch.setattr(training.offline.trl_setup, "time", SimpleNamespace(monotonic=lambda: now))
    progress = Progress(make_context("demonstrations", chats(4)))
    saved = []
    for step in range(1, 1001):
        now += 1.0
        control = SimpleNamespace(should_save=False)
        progress.on_step_end(None, SimpleNamespace(global_step=step, max_steps=1000), control)
        if control.should_save:
            now += 10.0
            progress.on_save(None, None, control)
            saved.append(step)
    assert saved == [30, 230, 430, 630, 830]


def test_the_last_step_writes_the_model_and_no_checkpoint(make_context, monkeypatch):
    monkeypatch.setattr(training.offline.trl_setup, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training.offline.trl_setup, "CHECKPOINT_SHARE", float("inf"))
    context = make_context("demonstrations", chats(16))
    run_sft(stage(max_steps=3), context)
    assert newest_checkpoint(context.checkpoints).name == "checkpoint-2"
