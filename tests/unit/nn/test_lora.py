"""Adapters: the fused product equals PEFT's, and what is merged is what was trained."""

from __future__ import annotations

import copy

import pytest
import torch
from numeric import assert_same
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from steersman.config.manifest import Lora
from steersman.errors import ConfigError
from steersman.nn.fused_lora import fuse_lora
from steersman.nn.load import load_causal_lm, load_classifier
from steersman.nn.lora import (
    attach_lora,
    load_adapter,
    merge_to_folder,
    quantization,
    round_frozen_products,
    save_adapter,
)
from steersman.nn.tiny import tiny_model
from steersman.testing.models import save_model_folder, tiny_llama, tiny_qwen2, tiny_roberta_reward, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def train_a_little(model: torch.nn.Module, seed: int = 0) -> None:
    """Moves every trainable weight, so that nothing is the identity any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def peft_forward_everywhere(model: torch.nn.Module) -> None:
    """Undoes `fuse_lora`."""
    for module in model.modules():
        module.__dict__.pop("forward", None) if type(module).__name__ == "Linear" else None


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16 autocast"])
def test_the_fused_product_equals_pefts(build, dtype):
    torch.manual_seed(0)  # of the adapters' beginning
    fused = attach_lora(build(), Lora(rank=4))
    train_a_little(fused)
    plain = copy.deepcopy(fused)
    peft_forward_everywhere(plain)
    results = []
    for model in (fused, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != "fp32"):
            logits = model(IDS).logits
        logits.float().square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits.float(), grads))
    computed = {"dtype": torch.float32} if dtype == "fp32" else {"dtype": torch.bfloat16, "roundings": 16}
    assert_same(results[0][0], results[1][0], **computed)
    assert_same(results[0][1], results[1][1], **computed)


def test_frozen_weights_are_rounded_once_for_products_in_bf16():
    """Autocast rounds them at every pass: the same numbers, bit for bit."""
    model, values = attach_lora(tiny_llama(), Lora(rank=4)), []
    train_a_little(model)
    for rounded in (False, True):
        if rounded:
            round_frozen_products(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(IDS).logits
        logits.float().square().mean().backward()
        values.append([logits.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)])
        model.zero_grad()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert model.base_model.model.lm_head.weight.dtype == torch.float32
    for before, after in zip(*values, strict=True):
        assert torch.equal(before, after)


def test_a_disabled_adapter_gives_the_base_model():
    base = tiny_llama()
    expected = base(IDS).logits.detach().clone()
    model = attach_lora(base, Lora(rank=4))
    train_a_little(model)
    with model.disable_adapter():
        assert_same(model(IDS).logits, expected)
    assert (model(IDS).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("lora", [Lora(rank=4), Lora(rank=4, use_dora=True)], ids=["lora", "dora"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2], ids=["tied", "untied"])
def test_merged_folder_equals_the_trained_model(tmp_path, lora, build):
    base = save_model_folder(tmp_path / "base", build())
    model = attach_lora(load_causal_lm(base), lora)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged", stop_ids=[0, 2])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(merged(IDS).logits, model.eval()(IDS).logits)
    tied = build().config.tie_word_embeddings
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert names == load_file(base / "model.safetensors").keys()
    assert merged.generation_config.eos_token_id == [0, 2]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tiny_tokenizer().chat_template


def test_the_adapter_folder_is_peft_format(tmp_path):
    model = attach_lora(tiny_llama(), Lora(rank=4))
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    other = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert_same(other(IDS).logits, model(IDS).logits)


def test_training_continues_from_an_adapter(tmp_path):
    model = attach_lora(tiny_llama(), Lora(rank=4))
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_llama(), tmp_path / "adapter", trainable=True)
    trainable = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    again(IDS).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in again.parameters() if parameter.requires_grad)
    frozen = load_adapter(tiny_llama(), tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_an_adapter_arrives_whole_where_a_familys_checkpoints_have_other_names(tmp_path):
    """PEFT renames `shared_experts` to what checkpoints call it, and drops those weights without a word."""
    base = save_model_folder(tmp_path / "base", tiny_model(AutoModelForCausalLM, CONFIG_MAPPING["laguna"]()))
    model = attach_lora(load_causal_lm(base), Lora(rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_causal_lm(base), tmp_path / "adapter")
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    assert_same(load_causal_lm(tmp_path / "merged")(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize(
    ("family", "read"), [("jamba", "dt_proj"), ("longcat_flash", "classifier"), ("mamba", "dt_proj")]
)
def test_a_weight_that_the_model_reads_itself_gets_no_adapter(tmp_path, family, read):
    """Jamba's Mamba layers read the weight of `dt_proj` without calling it, and LongCat's router that of `classifier`:
    an adapter there would do nothing until it is merged."""
    base = save_model_folder(tmp_path / "base", tiny_model(AutoModelForCausalLM, CONFIG_MAPPING[family]()))
    with pytest.raises(ConfigError, match=rf"lora\.targetModules names {read}, whose weight \w+ reads itself"):
        attach_lora(load_causal_lm(base), Lora(rank=4, target_modules=[read, "q_proj", "x_proj"]))
    model = attach_lora(load_causal_lm(base), Lora(rank=4))
    adapted = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted
    assert read not in adapted
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_causal_lm(tmp_path / "merged")(IDS).logits
    assert (merged - model.eval()(IDS).logits).abs().max() < 1e-3  # a recurrence carries roundings on


@pytest.mark.parametrize(("family", "changes", "layers"), [
    ("falcon", {}, "query_key_value"),  # linear layers of a class of its own
    ("falcon", {"alibi": True, "bias": True}, "dense_h_to_4h"),
    ("olmo", {"clip_qkv": 0.5}, "q_proj"),  # changes a layer's result in place
    ("llama4_text", {}, "q_proj"),  # so do the experts; the router gives two results
])  # fmt: skip
def test_every_layer_that_computes_a_product_learns(family, changes, layers):
    adapted = attach_lora(tiny_model(AutoModelForCausalLM, CONFIG_MAPPING[family](**changes)), Lora(rank=4))
    train_a_little(adapted)
    adapted(torch.arange(5, 25)[None]).logits.square().mean().backward()
    slopes = {name: one.grad for name, one in adapted.named_parameters() if "lora_" in name}
    assert any(layers in name for name in slopes)
    assert not any("router" in name for name in slopes)
    assert all(slope is not None and slope.abs().max() > 0 for name, slope in slopes.items() if layers in name)


def test_a_merge_that_gives_another_model_is_refused(tmp_path):
    """An adapter that came from elsewhere, with targets that do nothing before they are merged."""
    base = save_model_folder(tmp_path / "base", tiny_model(AutoModelForCausalLM, CONFIG_MAPPING["jamba"]()))
    model = get_peft_model(load_causal_lm(base), LoraConfig(target_modules=["dt_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="computes something else"):
        merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_encoders_head_is_trained_saved_and_merged(tmp_path):
    base = save_model_folder(tmp_path / "base", tiny_roberta_reward(num_labels=3), tiny_tokenizer(chat_template=None))
    model = attach_lora(load_classifier(base, num_labels=3), Lora(rank=4))
    assert any("classifier" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 3
    assert_same(merged(IDS).logits, model.eval()(IDS).logits)


def test_tied_embeddings_are_no_target():
    with pytest.raises(ConfigError, match="share their weights"):
        attach_lora(tiny_llama(), Lora(target_modules=["q_proj", "lm_head"]))
    attach_lora(tiny_qwen2(), Lora(target_modules=["q_proj", "lm_head"]))


def test_unknown_target_modules_are_named():
    with pytest.raises(ConfigError, match=r"lora\.targetModules \['nothing'\] does not fit"):
        attach_lora(tiny_llama(), Lora(target_modules=["nothing"]))


@pytest.mark.parametrize(
    ("given", "said"), [("((", "no regular expression (missing )"), ("", "names no layer"), ([], "names no layer")]
)
def test_target_modules_that_cannot_be_read_are_refused_with_the_manifest(given: str | list[str], said: str):
    with pytest.raises(ValueError, match=r"targetModules|target_modules") as refused:
        Lora(target_modules=given)
    assert said in str(refused.value)


def test_a_regular_expression_names_the_upper_layers():
    adapted = attach_lora(tiny_llama(), Lora(rank=2, target_modules=r".*layers[.]1[.].*_proj"))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".layers.1." in name for name in names)


def test_four_bits_need_a_gpu():
    assert quantization(Lora(), "cpu") is None
    assert quantization(None, "cpu") is None
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        quantization(Lora(quantize="nf4"), "cpu")


def test_an_incomplete_adapter_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"adapter_config\.json is missing"):
        merge_to_folder(tmp_path, tmp_path, tmp_path / "merged")


def test_dropout_and_variants_stay_with_peft():
    model = attach_lora(tiny_llama(), Lora(rank=4, dropout=0.5))
    train_a_little(model)
    model.train()
    torch.manual_seed(0)
    first = model(IDS).logits
    assert (model(IDS).logits - first).abs().max() > 1e-4, "dropout is lost"
    fuse_lora(model)
    model.merge_adapter()
    merged = model.eval()(IDS).logits
    model.unmerge_adapter()
    assert_same(model(IDS).logits, merged)


def test_an_adapter_of_another_model_is_refused_in_words(tmp_path):
    save_adapter(attach_lora(tiny_llama(), Lora(target_modules="all-linear")), tmp_path / "adapter")
    narrow = copy.deepcopy(tiny_llama().config)
    narrow.intermediate_size //= 2
    base = save_model_folder(tmp_path / "base", AutoModelForCausalLM.from_config(narrow))
    with pytest.raises(ConfigError, match="the adapter does not fit this base model"):
        merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
