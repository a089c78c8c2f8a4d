"""Weight updates of the transformers engine: full, partial, LoRA by PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_client import CUDA, random_prompts, reference_logprobs, samples
from numeric import assert_same
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from services.policy.engine import SamplingParams, WeightsUpdate
from services.policy.engines import transformers_engine
from services.policy.engines.transformers_engine import TransformersEngine
from services.policy.engines.weights import Merged
from steersman.errors import InvalidArgumentError
from steersman.testing.models import tiny_llama, tiny_qwen2

ATTENTION = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=[tiny_llama, tiny_qwen2])
def build(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(
    params=[("cpu", "plain"), ("cpu", "packed"), ("cpu", "transposed"), pytest.param(("cuda", "plain"), marks=CUDA)],
    ids="-".join,
)
def engine(
    build: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, rows: None
) -> Iterator[TransformersEngine]:
    """With every layout of weights, whatever is fast on this machine."""
    device, layout = request.param
    monkeypatch.setattr(transformers_engine, "weight_layout", lambda device, dtype: layout)
    engine = TransformersEngine(build(), precision="fp32", device=device)
    engine.start()
    yield engine
    engine.close()


def assert_serves(engine: TransformersEngine, reference: PreTrainedModel) -> None:
    prompts = random_prompts([4, 30])
    for (index, _), sample in samples(engine, prompts, SamplingParams(max_new_tokens=15, seed=1)).items():
        expected = reference_logprobs(reference, prompts[index], sample.token_ids)
        assert_same(sample.logprobs, expected)


def adapter(model: PreTrainedModel, seed: int = 0, **settings: Any) -> tuple[dict[str, torch.Tensor], dict, Any]:
    """State dict and configuration as PEFT saves them, and the model merged by PEFT."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 16, "target_modules": ATTENTION} | settings))
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    return tensors, config.to_dict(), wrapped.merge_and_unload()


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (True, {}),
        (True, {"target_modules": ALL_LINEAR}),
        (False, {"target_modules": ALL_LINEAR}),
        (True, {"use_rslora": True, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 2}}),
        (True, {"modules_to_save": ["norm"]}),
        (True, {"target_modules": ["embed_tokens", "k_proj"]}),
    ],
    indirect=["rows"],
)
def test_lora_equals_the_merge_of_peft(engine, build, settings) -> None:
    tensors, config, merged = adapter(build(), **settings)
    engine.load_weights(WeightsUpdate(1, "lora", tensors, config))
    assert_serves(engine, merged)


@pytest.mark.parametrize("rank", [1, 3, 4, 16])
def test_an_adapter_is_merged_in_float32_and_rounded_once(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base, b, a = (torch.randn(shape, generator=generator) for shape in ((24, 40), (24, rank), (rank, 40)))
    expected = base.bfloat16().double() + 0.5 * b.double() @ a.double()

    found = Merged(base.bfloat16(), b, a, 0.5).tensor(torch.bfloat16)

    torch.testing.assert_close(found.double(), expected, rtol=2.0**-8, atol=1e-5)


def test_a_second_adapter_replaces_the_first(engine, build) -> None:
    first, first_config, _ = adapter(build(), seed=1, target_modules=ALL_LINEAR)
    second, config, merged = adapter(build(), seed=2)
    engine.load_weights(WeightsUpdate(1, "lora", first, first_config))
    engine.load_weights(WeightsUpdate(2, "lora", second, config))
    assert_serves(engine, merged)
    assert engine.info().weights_version == 2


def test_full_weights_replace_all_and_a_lora_returns_to_the_start(engine, build) -> None:
    engine.load_weights(WeightsUpdate(1, "full", dict(build(seed=5).state_dict())))
    assert_serves(engine, build(seed=5))
    tensors, config, merged = adapter(build())
    engine.load_weights(WeightsUpdate(2, "lora", tensors, config))
    assert_serves(engine, merged)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_changes_with_the_embedding(name: str) -> None:
    engine = TransformersEngine(tiny_llama(), precision="fp32")
    engine.start()
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.embed_tokens.weight.add_(torch.randn(260, 32, generator=torch.Generator().manual_seed(3)) * 0.1)
    engine.load_weights(WeightsUpdate(1, "full", {name: changed.model.embed_tokens.weight.detach()}))
    assert_serves(engine, changed)
    engine.close()


def test_a_partial_update_leaves_the_rest(engine, build) -> None:
    changed = build()
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        changed.get_parameter(name).mul_(2.0)
    engine.load_weights(WeightsUpdate(1, "full", {name: changed.get_parameter(name).detach().bfloat16()}))
    with torch.no_grad():
        changed.get_parameter(name).copy_(changed.get_parameter(name).bfloat16())
    assert_serves(engine, changed)


@pytest.mark.parametrize("build", [tiny_llama], indirect=True)
@pytest.mark.parametrize("rows", [True], indirect=True)
@pytest.mark.parametrize(
    ("update", "message"),
    [
        (WeightsUpdate(1, "full", {}), "holds no tensors"),
        (WeightsUpdate(1, "full", {"model.nope": torch.ones(1)}), "'model.nope', which the served model does not"),
        (WeightsUpdate(1, "full", {"model.norm.weight": torch.ones(7)}), r"shape \[7\].* has \[32\]"),
        (WeightsUpdate(1, "lora", {"x.lora_A.weight": torch.ones(1, 1)}), "no adapter_config"),
        (WeightsUpdate(1, "lora", {}, {"lora_alpha": 1}), "holds no tensors"),
        (WeightsUpdate(1, "lora", {}, {"lora_alpha": 1, "use_dora": True}), "DoRA"),
        (
            WeightsUpdate(
                1, "lora", {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(1, 32)}, {"r": 1}
            ),
            "only one of lora_A and lora_B",
        ),
    ],
)
def test_a_wrong_update_is_refused_and_changes_nothing(engine, build, update, message) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        engine.load_weights(update)
    assert engine.info().weights_version == 0
    assert_serves(engine, build())


def test_a_tensor_changed_in_place_is_loaded_again(engine, build) -> None:
    changed = build()
    tensors = {
        "lm_head.weight" if build is tiny_qwen2 else "model.embed_tokens.weight": changed.lm_head.weight.detach()
    }
    for version in (1, 2):
        with torch.no_grad():
            changed.lm_head.weight.mul_(1.5)
        engine.load_weights(WeightsUpdate(version, "full", tensors))
        assert_serves(engine, changed)


def test_nothing_refers_to_an_update_that_was_loaded(engine, build) -> None:
    changed = build(seed=5)
    tensors = {name: tensor.clone() for name, tensor in changed.state_dict().items()}
    engine.load_weights(WeightsUpdate(1, "full", tensors))
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    assert_serves(engine, changed)
    part = "model.layers.0.self_attn.k_proj.weight"  # its neighbours in the stacked weight stay those of version 1
    with torch.no_grad():
        changed.get_parameter(part).mul_(2.0)
    engine.load_weights(WeightsUpdate(2, "full", {part: changed.get_parameter(part).detach()}))
    assert_serves(engine, changed)
