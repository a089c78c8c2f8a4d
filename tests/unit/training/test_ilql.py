"""ILQL learns what was worth more from what was said, in steps that do not depend on how they are computed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ilql_served import of_folder, served_logprobs
from safetensors.torch import load_file

from steersman.config.manifest import IlqlStage, Lora, Optimizer
from steersman.data.records import Return
from steersman.nn.ilql import HEADS_FILE, AdvantageHeads, read_heads
from steersman.nn.load import load_causal_lm, load_tokenizer
from steersman.testing.models import save_model_folder, tiny_llama, tiny_tokenizer
from training.offline import trl_setup
from training.offline.ilql import run_ilql
from training.offline.ilql_data import conversation_tokens


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def row(question: str, answer: str, reward: float) -> dict[str, Any]:
    return {"prompt": [user(question)], "completion": [assistant(answer)], "reward": reward}


OPTIONS: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 8,
    "micro_batch_size": 8,
    "max_length": 256,
    "optimizer": Optimizer(learning_rate=3e-3, schedule="constant", warmup_ratio=0),
}


def mixed_rows(count: int = 12) -> list[dict[str, Any]]:
    """Prompts and answers of very different length, some prompts twice, one conversation of several turns."""
    draw = random.Random(5)
    rows = [
        row("hm " * (number // 2) + "red", "no" + "!" * draw.randrange(9), draw.uniform(-1, 1))
        for number in range(count - 1)
    ]
    turns = [assistant("first"), user("and?"), assistant("then this")]
    return [*rows, {"prompt": [user("red")], "completion": turns, "reward": [0.5, 1.0]}]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / HEADS_FILE)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 2e-4) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=atol, rtol=0, msg=name)


def test_micro_batches_padding_and_order_change_nothing(make_context) -> None:
    rows = mixed_rows()
    found = []
    for micro, given in ((8, rows), (3, rows), (8, rows[::-1])):
        spec = IlqlStage(lora=None, **{**OPTIONS, "micro_batch_size": micro, "batch_size": 12})
        context = make_context("returns", given)
        found.append(weights(run_ilql(spec, context)["model"]))
        first = context.reporter.steps[0][2]
        assert first["q"] == first["v"] == first["advantage"] == 0.0
    assert_close(found[0], found[1])
    assert_close(found[0], found[2])


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_a_killed_stage_goes_on_to_the_same_weights(make_context, monkeypatch, lora) -> None:
    monkeypatch.setattr(trl_setup, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(trl_setup, "CHECKPOINT_SHARE", float("inf"))
    spec = IlqlStage(lora=lora, **{**OPTIONS, "max_steps": 4, "micro_batch_size": 3})
    context = make_context("returns", mixed_rows())
    whole = weights(run_ilql(spec, context)["model"])
    losses = [step[2]["loss"] for step in context.reporter.steps]
    shutil.rmtree(context.stage_dir)
    context = make_context("returns", mixed_rows())

    def step(number: int, total: int, **metrics: float) -> None:
        if number == 3:  # step 3 is computed, and not saved under its number
            shutil.rmtree(context.checkpoints / "step-3")
            raise KeyboardInterrupt

    monkeypatch.setattr(context.reporter, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run_ilql(spec, context)
    monkeypatch.undo()
    resumed = weights(run_ilql(spec, context)["model"])
    assert "continues after step 2" in context.reporter.notes
    assert [step[2]["loss"] for step in context.reporter.steps] == losses[2:]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_q_heads_learn_what_answers_were_worth(make_context, base_model, lam: float) -> None:
    """One prompt, two answers worth 1 and -1, each half of the time: Q of the first letter is its return, V between."""
    rows = [row("red", "a" if number % 2 else "b", 1.0 if number % 2 else -1.0) for number in range(8)]
    spec = IlqlStage(
        lora=None,
        heads_learning_rate=1e-2,
        expectile=0.5,
        lam=lam,
        cql=0.0,
        polyak=0.3,
        **{**OPTIONS, "max_steps": 120},
    )
    folder = run_ilql(spec, make_context("returns", rows))["model"]
    tokenizer = load_tokenizer(base_model)
    good, bad = (conversation_tokens(Return.model_validate(one), tokenizer, [2], "row") for one in (rows[1], rows[0]))
    model = load_causal_lm(folder)
    hidden = model(torch.tensor([good.prompt.tolist()]), output_hidden_states=True).hidden_states[-1][0, -1:]
    heads = AdvantageHeads.of(read_heads(folder), 32, 260)
    for head in heads.q:
        values = head(hidden)[0]
        assert values[good.rest[0]].item() == pytest.approx(1.0, abs=0.1)
        assert values[bad.rest[0]].item() == pytest.approx(-1.0, abs=0.1)
    assert heads.v(hidden).item() == pytest.approx(0.0, abs=0.15)


TERSE = (
    "{% for message in messages %}{{ '<|im_start|>' if message['role'] == 'user' else '' }}"
    "{{ message['content'] + '<|im_end|>' }}{% endfor %}"
)
"""Turns of two or three tokens, which a model of two layers tells apart soon."""


def conversations() -> list[dict[str, Any]]:
    """Who says a is asked x or y, as a coin falls, and has said the worse thing to it three times of four; who says b
    is asked z, to which nothing matters."""
    told = {("a", "x", "c"): 1, ("a", "x", "d"): 3, ("a", "y", "d"): 1, ("a", "y", "c"): 3, ("b", "z", "c"): 8}
    right = {("x", "c"), ("y", "d")}
    return [
        {
            "prompt": [user("go")],
            "completion": [assistant(first), user(asked), assistant(second)],
            "reward": 0.0 if asked == "z" else 1.0 if (asked, second) in right else -1.0,
        }
        for (first, asked, second), times in told.items()
        for _ in range(times)
    ]


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_ilql_puts_trajectories_together(make_context, tmp_path, expectile: float) -> None:
    """Saying a was worth -1/2 on average, saying b 0: who repeats what paid says b. The optimum, 1, is a and then what
    the other a-conversations show to be right; no conversation shows it for both questions.

    By hand: behind x (1 of 4 is worth 1, the others -1) the expectile v solves
    tau (1 - v) / 4 = (1 - tau) 3 (v + 1) / 4, which is -1/2 for tau 0.5 and 1/2 for tau 0.9, and that is Q(a).
    """
    spec = IlqlStage(
        lora=None,
        heads_learning_rate=1e-2,
        expectile=expectile,
        lam=0.0,
        cql=0.01,
        polyak=0.3,
        beta=8.0,
        optimizer=Optimizer(learning_rate=3e-3, schedule="linear", warmup_ratio=0.05),
        max_steps=400,
        batch_size=16,
        micro_batch_size=16,
    )
    base = save_model_folder(tmp_path / "terse", tiny_llama(), tiny_tokenizer(chat_template=TERSE))
    folder = run_ilql(spec, make_context("returns", conversations(), model=base))["model"]
    tokenizer = load_tokenizer(base)

    def ids(first: str, asked: str, second: str) -> tuple[list[int], list[int], int]:
        turns = [assistant(first), user(asked), assistant(second)]
        made = conversation_tokens(
            Return.model_validate({"prompt": [user("go")], "completion": turns, "reward": 0}), tokenizer, [2], "row"
        )
        return made.prompt.tolist(), made.rest.tolist(), int(np.flatnonzero(made.own)[2])

    def probability(first: str, asked: str, second: str) -> tuple[float, float]:
        """Of saying `first`, and of saying `second` to what is asked then."""
        prompt, rest, place = ids(first, asked, second)
        found = served_logprobs(*of_folder(folder), prompt, rest).exp()
        return found[0].item(), found[place].item()

    a, on_x = probability("a", "x", "c")
    _, on_y = probability("a", "y", "d")
    prompt, rest, _ = ids("a", "x", "c")
    hidden = load_causal_lm(folder)(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1:]
    heads = AdvantageHeads.of(read_heads(folder), 32, 260)
    q = torch.minimum(heads.q[0](hidden), heads.q[1](hidden))[0]
    b = ids("b", "z", "c")[1][0]
    # Another processor's rounding moves them by up to 0.13 after these steps (0.3 after half of them).
    assert q[rest[0]].item() == pytest.approx(0.5 if expectile == 0.9 else -0.5, abs=0.2)
    assert q[b].item() == pytest.approx(0.0, abs=0.2)
    assert min(on_x, on_y) > 0.98
    if expectile == 0.9:
        assert a * (on_x + on_y - 1) > 0.85  # what the policy earns, of 1 at most
    else:
        assert a < 0.1
