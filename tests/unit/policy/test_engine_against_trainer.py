"""The engine samples with the log-probabilities that the trainer computes: what makes importance ratios begin at 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_client import random_prompts, samples

from services.policy.engine import SamplingParams, WeightsUpdate
from services.policy.engines.transformers_engine import TransformersEngine
from steersman.config.manifest import Lora
from steersman.errors import FailedPreconditionError
from steersman.nn.packed import pack
from steersman.testing.models import save_model_folder, tiny_llama, tiny_t5
from training.online.mask_policy import MaskPolicy
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


@pytest.mark.parametrize("lora", [None, Lora(rank=4, target_modules=["q_proj", "down_proj"])], ids=["full", "lora"])
@pytest.mark.parametrize("decoder", ["llama", "generic", "cached", "uncached", "encoder-decoder"])
def test_tokens_are_drawn_from_the_sets_of_an_older_policy(tmp_path: Path, lora: Lora | None, decoder: str) -> None:
    """NLPO: both know the same sets and the same log-probabilities, after updates and a new mask policy, too."""
    encodes = decoder == "encoder-decoder"
    folder = save_model_folder(tmp_path, tiny_t5(seed=3) if encodes else tiny_llama())
    if encodes and lora is not None:
        lora = Lora(rank=4, target_modules=["q", "wo"])
    engine = TransformersEngine(folder, precision="fp32", device="cpu", decoder=decoder)  # type: ignore[arg-type]
    engine.start()
    prompts = random_prompts([5, 40, 17])
    params = SamplingParams(max_new_tokens=12, seed=3, temperature=0.8, mask_top_p=0.6)
    with pytest.raises(FailedPreconditionError, match="no mask policy"):
        samples(engine, prompts, params)
    trainer = PolicyModel(folder, lora, None, None, device="cpu", precision="fp32", temperature=0.8, seed=0)
    trainer.mask = mask = MaskPolicy(trainer.policy, 0.6, refresh_every=2)
    torch.manual_seed(5)
    for steps in (1, 2):
        with torch.no_grad():
            for one in trainer.policy_parameters():
                one.add_(torch.randn_like(one) * 0.3 * one.std().clamp(min=0.05))
        mask.after(steps)
        payload = trainer.payload(torch.float32)
        engine.load_weights(WeightsUpdate(steps, payload.kind, payload.tensors, payload.adapter_config))
        found = samples(engine, prompts, params, n=4)
        responses = [[found[prompt, sample].token_ids for sample in range(4)] for prompt in range(3)]
        packed = pack(list(zip(prompts, responses, strict=True)))
        with torch.no_grad():
            expected, whole = trainer(packed).logprobs.numpy(), trainer.logprobs(packed).numpy()
        sampled = np.concatenate([found[prompt, sample].logprobs for prompt in range(3) for sample in range(4)])
        assert np.abs(sampled - expected).max() <= 1e-4
        assert (expected - whole).mean() > 0.05  # the sets do leave something out
        with mask.in_place():
            older = trainer.logprobs(packed).numpy()
        assert (np.abs(older - whole).max() > 0.01) == (steps == 1)  # the second time it is the policy itself
    free = samples(engine, prompts, SamplingParams(max_new_tokens=6, seed=3), n=2)
    engine.close()
    assert len(free) == 6
