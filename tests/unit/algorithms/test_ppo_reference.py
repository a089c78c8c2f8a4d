"""PPO end to end (rewards, whitening, GAE, returns, losses) against the numpy reference, on ragged batches."""

from __future__ import annotations

import numpy as np
import ppo_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_same
from torch import Tensor

from training.mathematics.advantages import gae
from training.mathematics.kl import k1
from training.mathematics.losses import ppo_policy_loss, value_loss
from training.mathematics.moments import whiten
from training.mathematics.rewards import token_rewards


class Batch:
    """N ragged responses with everything PPO needs, as rows of fp64 numpy and packed fp32 tensors."""

    def __init__(self, lengths: list[int], seed: int) -> None:
        random = np.random.default_rng(seed)
        self.lengths = torch.tensor(lengths)
        self.scores = random.normal(size=len(lengths)).astype(np.float32)
        self.rows: dict[str, list[np.ndarray]] = {}
        base = [-random.exponential(size=n) for n in lengths]
        for name, spread in (("old", 0.0), ("new", 0.3), ("ref", 0.2)):
            self.rows[name] = [(row + random.normal(0, spread, len(row))).astype(np.float32) for row in base]
        for name in ("old_values", "values"):
            self.rows[name] = [random.normal(size=n).astype(np.float32) for n in lengths]

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(np.concatenate(self.rows[name]))

    def fp64(self, name: str) -> list[np.ndarray]:
        return [row.astype(np.float64) for row in self.rows[name]]


def close(ours: Tensor, theirs: list[np.ndarray]) -> None:
    expected = torch.tensor(np.concatenate(theirs))
    assert ours.dtype == torch.float32
    assert_same(ours, expected, size=max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("whiten_rewards", [True, False])
@pytest.mark.parametrize(
    ("lengths", "gamma", "lam"),
    [([6] * 8, 1.0, 0.95), ([3, 0, 1, 17, 0, 5, 2, 0], 1.0, 0.95), ([64, 1, 30], 0.9, 0.5), ([5, 9], 1.0, 1.0)],
)
def test_ppo_equals_the_reference(lengths: list[int], gamma: float, lam: float, whiten_rewards: bool) -> None:
    batch = Batch(lengths, seed=sum(lengths))
    scores = batch.scores.astype(np.float64)
    expected_rewards = reference.compute_rewards(scores, batch.fp64("old"), batch.fp64("ref"), 0.05)
    rewards = token_rewards(torch.tensor(batch.scores), k1(batch["old"], batch["ref"]), batch.lengths, 0.05)
    close(rewards, expected_rewards)
    if whiten_rewards:
        expected_rewards = reference.whiten(expected_rewards, shift_mean=False)
        rewards = whiten(rewards, shift_mean=False)
        close(rewards, expected_rewards)

    expected_advantages, expected_returns = reference.gae(expected_rewards, batch.fp64("old_values"), gamma, lam)
    advantages, returns = gae(rewards, batch["old_values"], batch.lengths, gamma=gamma, lam=lam)
    close(advantages, expected_advantages)
    close(returns, expected_returns)
    expected_advantages = reference.whiten(expected_advantages)
    advantages = whiten(advantages)
    close(advantages, expected_advantages)

    expected = reference.losses(
        batch.fp64("new"),
        batch.fp64("old"),
        expected_advantages,
        batch.fp64("values"),
        batch.fp64("old_values"),
        expected_returns,
        0.2,
        0.2,
    )
    tokens = sum(lengths)
    policy, stats = ppo_policy_loss(batch["new"], batch["old"], advantages, denominator=tokens)
    value, value_stats = value_loss(batch["values"], batch["old_values"], returns, denominator=tokens)
    got = {
        "policy": policy.item(),
        "value": value.item(),
        "clipfrac": stats.means()["clip_fraction"],
        "value_clipfrac": value_stats.means()["value_clip_fraction"],
        "approxkl": stats.means()["approx_kl"],
        "error": value_stats.means()["value_error"],
    }
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert 0 < expected["clipfrac"] < 1


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_gae_equals_the_reference_everywhere(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    batch = Batch(lengths, seed)
    expected = reference.gae(batch.fp64("values"), batch.fp64("old_values"), gamma, lam)
    for ours, theirs in zip(
        gae(batch["values"], batch["old_values"], batch.lengths, gamma=gamma, lam=lam), expected, strict=True
    ):
        close(ours, theirs)
