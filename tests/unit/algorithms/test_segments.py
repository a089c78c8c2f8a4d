"""Ragged helpers against plain loops, empty samples in every place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.errors import InvalidArgumentError
from training.mathematics import segments

ragged = st.lists(st.lists(st.floats(-100, 100, width=32), max_size=9), max_size=7)


def pack(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    flat = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    return flat, torch.tensor([len(row) for row in rows], dtype=torch.int64)


def test_indices_with_empty_samples() -> None:
    lengths = torch.tensor([0, 2, 0, 3, 0])
    assert segments.starts(lengths).tolist() == [0, 0, 2, 2, 5]
    assert segments.last_indices(lengths).tolist() == [-1, 1, -1, 4, -1]


def test_discounted_sum_by_hand() -> None:
    # second sample: 3 + 0.5 * 4 + 0.25 * 8 = 7;  4 + 0.5 * 8 = 8;  8
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0])
    result = segments.reverse_discounted_sum(values, 0.5, torch.tensor([2, 0, 3]))
    assert result.tolist() == [2.0, 2.0, 7.0, 8.0, 8.0]


@given(ragged, st.floats(0, 1))
def test_discounted_sum_equals_the_loop(rows: list[list[float]], discount: float) -> None:
    values, lengths = pack(rows)
    expected = []
    for row in rows:
        carry, reversed_row = 0.0, []
        for value in reversed(row):
            carry = value + discount * carry
            reversed_row.append(carry)
        expected += reversed_row[::-1]
    result = segments.reverse_discounted_sum(values, discount, lengths)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-9)


@given(ragged)
def test_sums_and_means_equal_the_loop(rows: list[list[float]]) -> None:
    values, lengths = pack(rows)
    sums = torch.tensor([sum(row) for row in rows], dtype=torch.float64)
    means = torch.tensor([sum(row) / max(len(row), 1) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(segments.segment_sum(values, lengths), sums)
    torch.testing.assert_close(segments.segment_mean(values, lengths), means)


@given(ragged, st.data())
def test_select_keeps_whole_samples(rows: list[list[float]], data: st.DataObject) -> None:
    keep = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    values, lengths = pack(rows)
    expected, _ = pack([row for row, kept in zip(rows, keep, strict=True) if kept])
    assert segments.select(values, lengths, torch.tensor(keep, dtype=torch.bool)).tolist() == expected.tolist()


def test_a_sample_does_not_feel_its_neighbours() -> None:
    """Bit for bit: alone, or between others of other lengths."""
    torch.manual_seed(0)
    lengths = torch.tensor([5, 0, 1000, 17])
    values = torch.randn(int(lengths.sum()))
    together = segments.reverse_discounted_sum(values, 0.95, lengths)
    sums = segments.segment_sum(values, lengths)
    for index, (start, length) in enumerate(zip(segments.starts(lengths).tolist(), lengths.tolist(), strict=True)):
        alone, one = values[start : start + length], torch.tensor([length])
        assert torch.equal(segments.reverse_discounted_sum(alone, 0.95, one), together[start : start + length])
        assert torch.equal(segments.segment_sum(alone, one)[0], sums[index])


def test_segment_sum_passes_gradients() -> None:
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segments.segment_sum(x, torch.tensor([0, 2, 3])), (values,))


@pytest.mark.parametrize("lengths", [torch.tensor([2, 2]), torch.tensor([4, -1]), torch.tensor([1.0, 2.0])])
def test_wrong_lengths_are_refused(lengths: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match="lengths"):
        segments.segment_sum(torch.zeros(3), lengths)
