"""What the vLLM engine makes of an update: the parameters by the names that the checkpoint's files have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from services.policy.engines.vllm_weights import Checkpoint
from steersman.errors import InvalidArgumentError
from steersman.generation import WeightsUpdate
from steersman.nn.tiny import tiny_model


def model_of(family: str, seed: int) -> PreTrainedModel:
    return tiny_model(AutoModelForCausalLM, CONFIG_MAPPING[family](), seed=seed)


def files_of(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def checkpoint(folder: Path, scratch: Path, model: PreTrainedModel) -> Checkpoint:
    scratch.mkdir()
    return Checkpoint(folder, scratch, torch.float32, tied=model.config.get_text_config().tie_word_embeddings)


def read(found: Checkpoint, update: WeightsUpdate) -> dict[str, Tensor]:
    return {name: load_file(path)[name] for name, path in found.after(update).paths.items()}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3", "gpt2"])
def test_what_training_sends_arrives_under_the_names_of_the_files(family: str, tmp_path: Path) -> None:
    old, new = model_of(family, 0), model_of(family, 1)
    files_of(old, tmp_path / "old")
    wanted = files_of(new, tmp_path / "new")
    found = read(
        checkpoint(tmp_path / "old", tmp_path / "scratch", old), WeightsUpdate(1, "full", dict(new.named_parameters()))
    )
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0, msg=name)


def test_the_names_of_a_hubs_files_are_found(tmp_path: Path) -> None:
    """GPT-2's have no prefix."""
    old, new = model_of("gpt2", 0), model_of("gpt2", 1)
    held = files_of(old, tmp_path / "old")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    save_file(bare, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    found = read(
        checkpoint(tmp_path / "old", tmp_path / "scratch", old), WeightsUpdate(1, "full", dict(new.named_parameters()))
    )
    assert torch.equal(found["h.0.attn.c_attn.weight"], new.transformer.h[0].attn.c_attn.weight)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_adapter_is_merged_into_the_files_weights(family: str, tmp_path: Path) -> None:
    base = model_of(family, 0)
    files_of(base, tmp_path / "base")
    found = checkpoint(tmp_path / "base", tmp_path / "scratch", base)
    config = LoraConfig(r=2, target_modules=r".*layers\.\d+\.self_attn\.q_proj")
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, one in adapted.named_parameters():
            if "lora_" in name:
                one.normal_()
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(adapted).items()}
    served = read(found, WeightsUpdate(1, "lora", tensors, config.to_dict()))
    wanted = files_of(adapted.merge_and_unload(), tmp_path / "merged")
    for name, tensor in served.items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)


def test_a_name_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    model = model_of("mixtral", 0)
    files_of(model, tmp_path / "model")
    with pytest.raises(InvalidArgumentError, match=r"'model\.other\.weight', which the served model does not have"):
        checkpoint(tmp_path / "model", tmp_path / "scratch", model).after(
            WeightsUpdate(1, "full", {"model.other.weight": torch.zeros(2)})
        )
