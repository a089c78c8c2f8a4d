"""A step of every stage over packed rows equals TRL's over padded ones: the loss, and the gradient of every weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trl.trainer.utils

from benchmarks.train_stages import STAGES, trainer_of


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_equals_the_padded_one(
    stage: str, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for packed in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(trl.trainer.utils, "_use_triton", trl.trainer.utils._use_triton)
            trainer, batch = trainer_of(stage, base_model, packed, str(tmp_path))
            with torch.no_grad():  # away from the start, where adapters and log-ratios are 0
                generator = torch.Generator().manual_seed(1)
                for parameter in trainer.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            loss = trainer.compute_loss(trainer.model.train(), dict(trainer.data_collator(batch)))
            loss.backward()
        gradients = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
        found.append((loss.item(), gradients))
    (expected, padded), (actual, packed_gradients) = found
    assert actual == pytest.approx(expected, abs=1e-5)
    assert padded.keys() == packed_gradients.keys()
    for name, gradient in padded.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
