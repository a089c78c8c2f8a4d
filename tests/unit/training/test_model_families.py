"""Families with names, layers and heads of their own, through the stages: trained, published, served, merged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numeric import assert_same
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from steersman.config.manifest import Lora
from steersman.nn.load import load_causal_lm
from steersman.nn.lora import merge_to_folder, save_adapter
from steersman.nn.packed import pack
from steersman.nn.parity import example_groups
from steersman.nn.tiny import tiny_model
from steersman.testing.models import save_model_folder
from training.evaluate import read_weights
from training.online.policy_model import PolicyModel

LORAS = {"full": None, "lora": Lora(rank=4), "dora": Lora(rank=4, use_dora=True)}
FAMILIES = {
    "mixtral": {},
    "qwen3_moe": {},
    "gpt2": {},
    "gemma2": {},
    "lfm2": {"full_attn_idxs": [2], "num_hidden_layers": 3},
    "opt": {},
    "llama4_text": {},
}


def folder_of(family: str, path: Path) -> Path:
    return save_model_folder(path, tiny_model(AutoModelForCausalLM, CONFIG_MAPPING[family](**FAMILIES[family])))


def trained(folder: Path, lora: Lora | None) -> PolicyModel:
    model = PolicyModel(folder, lora, None, None, device="cpu", precision="fp32", temperature=1.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if one.requires_grad and (lora is None or "lora_B" in name or "magnitude" in name):
                one.add_(0.05 * torch.randn(one.shape, generator=generator))
    return model


@pytest.mark.parametrize("lora", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_published_and_merged_is_what_was_trained(family: str, lora: str, tmp_path: Path) -> None:
    """Experts, Conv1D layers and tied heads: by the names of the loaded model."""
    base = folder_of(family, tmp_path / "base")
    model = trained(base, LORAS[lora])
    batch = pack(example_groups())
    expected = model.logprobs(batch).detach()
    if LORAS[lora] is not None:
        save_adapter(model.policy, tmp_path / "adapter")
        merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
        merged = PolicyModel(
            tmp_path / "merged", None, None, None, device="cpu", precision="fp32", temperature=1, seed=0
        )
        assert_same(merged.logprobs(batch), expected, roundings=1024)
    payload = model.payload(torch.float32)
    if payload.kind == "full":
        served = PolicyModel(base, None, None, None, device="cpu", precision="fp32", temperature=1, seed=0)
        own = dict(served.policy.named_parameters())
        assert set(payload.tensors) <= set(own)
        for name, value in payload.tensors.items():
            own[name].data.copy_(value)
        assert_same(served.logprobs(batch), expected, roundings=1024)


def test_an_evaluation_publishes_the_loaded_models_names(tmp_path: Path) -> None:
    """Not those of the files: experts lie there one by one, and other files may lie beside them."""
    folder = folder_of("mixtral", tmp_path / "model")
    save_file({"rotary_emb.inv_freq": torch.ones(4)}, folder / "consolidated.safetensors")
    weights = read_weights(folder)
    model = load_causal_lm(folder)
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, one in model.named_parameters():
        assert torch.equal(weights[name], one), name


@pytest.mark.parametrize("family", ["lfm2", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family: str, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path / "model")
    batch, gradients = pack(example_groups()), []
    for checkpointing in (False, True):
        model = PolicyModel(
            folder, None, None, None, device="cpu", precision="fp32", temperature=1, seed=0,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        model.logprobs(batch).sum().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert_same(*gradients)
    assert np.isfinite(float(gradients[0]["policy." + next(iter(read_weights(folder)))].abs().max()))
