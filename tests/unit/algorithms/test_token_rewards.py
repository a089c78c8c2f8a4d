"""Scores to rewards: where the score lands, what a missing one does, penalties, scaling, whitening."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.errors import InvalidArgumentError
from training.mathematics.moments import Moments, whiten
from training.mathematics.rewards import penalize_missing_eos, present, sequence_rewards, token_rewards
from training.mathematics.segments import select

NAN = math.nan


def test_reward_by_hand() -> None:
    # beta 0.1: first sample -0.1 * (0.5, 1.0) + (0, 2); second is empty; third -0.1 * -0.5 + -1
    rewards = token_rewards(
        torch.tensor([2.0, 7.0, -1.0]), torch.tensor([0.5, 1.0, -0.5]), torch.tensor([2, 0, 1]), 0.1
    )
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 1.9, -0.95]))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.floats(0, 1))
def test_nothing_is_lost_and_nothing_is_added(lengths: list[int], beta: float) -> None:
    """The rewards of a response sum to score - beta * KL, and an empty response leaves no trace."""
    generator = torch.Generator().manual_seed(sum(lengths))
    scores = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    kl = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    sizes = torch.tensor(lengths)
    per_sample = token_rewards(scores, kl, sizes, beta).split(lengths)
    expected = sequence_rewards(scores, kl, sizes, beta)
    for rewards, whole, length in zip(per_sample, expected, lengths, strict=True):
        assert math.isnan(whole) if length == 0 else torch.allclose(rewards.sum(), whole)


def test_a_missing_score_is_never_zero() -> None:
    scores, lengths, kl = torch.tensor([1.0, NAN, 3.0, 4.0]), torch.tensor([1, 1, 0, 2]), torch.zeros(4)
    with pytest.raises(InvalidArgumentError, match="missing"):
        token_rewards(scores, kl, lengths, 0.1)
    keep = present(scores, lengths)
    assert keep.tolist() == [True, False, False, True]
    assert token_rewards(scores[keep], select(kl, lengths, keep), lengths[keep], 0.1).tolist() == [1.0, 0.0, 4.0]
    for changed in (
        penalize_missing_eos(scores, torch.zeros(4, dtype=torch.bool), 1.0, "replace"),
        penalize_missing_eos(scores, torch.zeros(4, dtype=torch.bool), 1.0),
        whiten(scores),
        sequence_rewards(scores, kl, lengths, 0.1),
    ):
        assert math.isnan(changed[1])


def test_missing_eos_by_hand() -> None:
    scores, has_eos = torch.tensor([0.5, 2.0, -3.0]), torch.tensor([True, False, False])
    assert penalize_missing_eos(scores, has_eos, 1.0).tolist() == [0.5, 1.0, -4.0]
    assert penalize_missing_eos(scores, has_eos, 1.0, "replace").tolist() == [0.5, -1.0, -1.0]


def test_moments_add_up_and_skip_what_is_missing() -> None:
    torch.manual_seed(0)
    values = torch.randn(100) * 3 + 50
    whole = Moments.of(values)
    parts = Moments()
    for part in values.split(7):
        parts = parts + Moments.of(torch.cat([part, torch.tensor([NAN])]))
    assert (parts.count, parts.mean, parts.std) == pytest.approx((100, whole.mean, whole.std), rel=1e-12)
    assert whole.mean == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert whole.std == pytest.approx(values.double().std(unbiased=False).item(), rel=1e-9)
    assert (Moments().mean, Moments().std) == (0.0, 0.0)


def test_whiten_by_hand() -> None:
    # mean 2, population variance 1
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0])
    assert whiten(torch.tensor([1.0, 3.0]), shift_mean=False).tolist() == pytest.approx([1.0, 3.0])
    # global moments, not those of this part: mean 0, variance 4
    assert whiten(torch.tensor([2.0]), Moments(2, 0.0, 8.0)).tolist() == pytest.approx([1.0])
    assert whiten(torch.tensor([5.0, 5.0])).tolist() == [0.0, 0.0]
