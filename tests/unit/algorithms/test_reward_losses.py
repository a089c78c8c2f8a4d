"""Reward-model losses on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from steersman.errors import InvalidArgumentError
from training.mathematics.reward_losses import aspect_loss, binary_loss, pairwise_loss
from training.mathematics.stats import merge


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_pairwise_by_hand() -> None:
    # differences 2 and -1: -log sigmoid(2) = 0.126928, -log sigmoid(-1) = 1.313262; / 4 pairs of the whole batch
    chosen, rejected = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0])
    loss, stats = pairwise_loss(chosen, rejected, denominator=4)
    assert loss.item() == pytest.approx((0.126928 + 1.313262) / 4, abs=1e-6)
    assert (stats.count, stats.correct, stats.reward) == (2, 1, 1)


def test_margin_and_centering_by_hand() -> None:
    # Llama 2 eq. 2, margin 3 and 0: softplus(3 - 2) + softplus(1) = 2 * 1.313262; + 0.01 * (16 + 1)
    chosen, rejected = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0])
    margin = torch.tensor([3.0, 0.0])
    loss, _ = pairwise_loss(chosen, rejected, margin=margin, centering=0.01, denominator=2)
    assert loss.item() == pytest.approx((2 * softplus(1.0) + 0.17) / 2, abs=1e-6)


def test_a_tie_is_half_right() -> None:
    assert pairwise_loss(torch.ones(2), torch.ones(2), denominator=2)[1].means()["accuracy"] == 0.5


def test_binary_by_hand() -> None:
    logits, preferred = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([True, False, False])
    loss, stats = binary_loss(logits, preferred, denominator=3)
    assert loss.item() == pytest.approx((softplus(-2.0) + softplus(2.0) + softplus(-1.0)) / 3, abs=1e-6)
    assert stats.correct == 2
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, preferred.float())
    torch.testing.assert_close(loss, expected)


def test_aspects_by_hand() -> None:
    # errors: (1 - 0)^2 and (2 - 4)^2 exist, two are missing: 5 / 2
    predictions = torch.tensor([[1.0, 7.0], [2.0, 7.0]], requires_grad=True)
    targets = torch.tensor([[0.0, math.nan], [4.0, math.nan]])
    loss, stats = aspect_loss(predictions, targets, denominator=2)
    loss.backward()
    assert (loss.item(), stats.count) == (2.5, 2)
    assert predictions.grad is not None
    assert predictions.grad.tolist() == [[1.0, 0.0], [-2.0, 0.0]]
    with pytest.raises(InvalidArgumentError, match="differ"):
        aspect_loss(predictions, targets[:, :1], denominator=2)


def test_split_of_pairs_changes_nothing() -> None:
    torch.manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 9, dtype=torch.float64)
    whole, stats = pairwise_loss(chosen, rejected, margin=margin, centering=0.1, denominator=9)
    parts = [
        pairwise_loss(chosen[rows], rejected[rows], margin=margin[rows], centering=0.1, denominator=9)
        for rows in (slice(0, 1), slice(1, 7), slice(7, 9))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    assert merge(part for _, part in parts).means() == pytest.approx(stats.means())
