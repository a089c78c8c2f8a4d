"""Engine against trainer, by hand."""

from __future__ import annotations

import pytest
import torch

from training.mathematics.mismatch import mismatch_stats, truncated_importance_weights
from training.mathematics.stats import merge

# trainer / engine: 0.5/0.5 = 1, 0.6/0.2 = 3, 0.1/0.2 = 0.5
TRAINER = torch.tensor([0.5, 0.6, 0.1]).log()
ENGINE = torch.tensor([0.5, 0.2, 0.2]).log()


def test_weights_by_hand() -> None:
    weights = truncated_importance_weights(TRAINER.clone().requires_grad_(), ENGINE, cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, 0.5])
    assert not weights.requires_grad


def test_statistics_by_hand() -> None:
    # |diff|: 0, ln 3, ln 2; ratio 1 + 3 + 0.5; k3 of KL(engine || trainer) = r - 1 - ln r: 0, 0.901388, 0.193147
    means = mismatch_stats(TRAINER, ENGINE).means()
    assert means["mean_abs"] == pytest.approx((1.0986123 + 0.6931472) / 3, abs=1e-6)
    assert means["max_abs"] == pytest.approx(1.0986123, abs=1e-6)
    assert means["ratio"] == pytest.approx(1.5)
    assert means["kl"] == pytest.approx((0.9013877 + 0.1931472) / 3, abs=1e-6)
    assert means["above_cap"] == pytest.approx(1 / 3)


def test_parts_add_up() -> None:
    parts = [mismatch_stats(TRAINER[rows], ENGINE[rows]) for rows in (slice(0, 1), slice(1, 1), slice(1, 3))]
    assert merge(parts).means() == pytest.approx(mismatch_stats(TRAINER, ENGINE).means())


def test_weighted_tokens_estimate_what_the_trainer_would_have_sampled() -> None:
    """Under the cap the correction is exact: E_engine[w f] = E_trainer[f]."""
    trainer = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    engine = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    value = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    weights = truncated_importance_weights(trainer.log(), engine.log())
    torch.testing.assert_close((engine * weights * value).sum(), (trainer * value).sum())
