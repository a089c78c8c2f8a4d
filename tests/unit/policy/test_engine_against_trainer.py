"""The engine samples with the log-probabilities that the trainer computes: what makes importance ratios begin at 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_client import random_prompts, samples

from services.policy.engine import SamplingParams
from services.policy.engines.transformers_engine import TransformersEngine
from steersman.nn.packed import pack
from steersman.testing.models import save_model_folder, tiny_llama
from training.online.policy_model import PolicyModel


@pytest.mark.parametrize(("precision", "mismatch"), [("fp32", 1e-4), ("bf16", 0.04)])
def test_the_mismatch_is_small(tmp_path: Path, device: str, precision: str, mismatch: float) -> None:
    folder = save_model_folder(tmp_path, tiny_llama())
    engine = TransformersEngine(folder, precision=precision, device=device)  # type: ignore[arg-type]
    engine.start()
    prompts, params = random_prompts([5, 40, 17]), SamplingParams(max_new_tokens=24, seed=3, temperature=0.8)
    found = samples(engine, prompts, params, n=4)
    engine.close()
    trainer = PolicyModel(
        folder, None, None, None, device=device, precision=precision, temperature=params.temperature, seed=0
    )
    responses = [[found[prompt, sample].token_ids for sample in range(4)] for prompt in range(3)]
    with torch.no_grad():
        expected = trainer.logprobs(pack(list(zip(prompts, responses, strict=True)), device)).cpu().numpy()
    sampled = np.concatenate([found[prompt, sample].logprobs for prompt in range(3) for sample in range(4)])
    assert np.abs(sampled - expected).mean() <= mismatch
    assert abs(np.exp(expected - sampled).mean() - 1) <= mismatch
