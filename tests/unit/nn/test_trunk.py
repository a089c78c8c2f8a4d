"""The trunk without padding computes what the padded trunk computes."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_same, gradients_of

from steersman.errors import InvalidArgumentError
from steersman.nn.parity import skip_padding
from steersman.nn.sharing import places_of, share_beginnings
from steersman.testing.models import tiny_llama, tiny_llama_reward, tiny_qwen2, tiny_roberta_reward


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [3] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


BATCHES = {
    "pairs": [[5, 6, 7, 8, 9], [5, 6, 11], [5, 6, 7, 10], [5, 6, 11, 12, 13, 14]],
    "nothing in common": [[5, 6, 7], [9, 8], [10]],
    "a row that is the beginning of its partner": [[5, 6, 7], [5, 6]],
    "one row": [[4, 5, 6]],
    "equal rows": [[4, 5], [4, 5]],
}


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_logits_and_gradients_equal_the_padded_forward(build, rows):
    plain = build()
    quick = copy.deepcopy(plain)
    assert skip_padding(quick).outcome == "agrees"
    batch = padded(rows)
    real = batch["attention_mask"].bool()
    expected, actual = plain(**batch).logits[real], quick(**batch).logits[real]
    assert_same(actual, expected)

    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    assert_same(gradients_of(quick), gradients_of(plain))


def test_gradient_checkpointing_changes_nothing():
    model = tiny_llama()
    skip_padding(model)
    batch = padded(BATCHES["pairs"])

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    model.train()
    before = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradient(), before)


def test_rewards_of_a_classifier_are_read_at_the_last_token():
    plain = tiny_llama_reward()
    quick = copy.deepcopy(plain)
    skip_padding(quick)
    batch = padded(BATCHES["pairs"])
    assert_same(quick(**batch).logits, plain(**batch).logits)


def test_encoders_stay_as_they_are():
    model = tiny_roberta_reward()
    batch = padded(BATCHES["pairs"])
    expected = model(**batch).logits
    assert skip_padding(model).outcome == "agrees"
    assert torch.equal(model(**batch).logits, expected)


def test_left_padding_is_refused():
    model = tiny_llama()
    skip_padding(model)
    with pytest.raises(InvalidArgumentError, match="padded on the right"):
        model(input_ids=torch.tensor([[3, 5]]), attention_mask=torch.tensor([[0, 1]]))


rows_strategy = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(np.array), min_size=1, max_size=7)


@settings(deadline=None, max_examples=200)
@given(rows_strategy)
def test_every_token_is_found_where_it_was_put(rows):
    groups = share_beginnings(rows)
    tokens = np.concatenate([*(group.prompt for group in groups), *(rest for group in groups for rest in group.rests)])
    width = max(map(len, rows))
    index = places_of(groups, len(rows), width)
    for row, positions in zip(rows, index, strict=True):
        assert tokens[positions[: len(row)]].tolist() == row.tolist()
        assert (positions[len(row) :] == -1).all()
    assert len(tokens) == min(size for size in map(total, partitions(sorted(row.tolist() for row in rows))))


def partitions(rows: list) -> list[list]:
    """Every way to cut a list into runs."""
    if not rows:
        return [[]]
    return [[rows[:n], *rest] for n in range(1, len(rows) + 1) for rest in partitions(rows[n:])]


def total(runs: list) -> int:
    """Tokens that remain when every run's common beginning is kept once."""
    shared = [
        len(list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*run, strict=False)))) for run in runs
    ]
    return sum(sum(map(len, run)) - (len(run) - 1) * size for run, size in zip(runs, shared, strict=True))
