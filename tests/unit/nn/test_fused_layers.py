"""Norms, rotations, gates and residual sums in fewer passes: the same numbers, only where a module computes that."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numeric import assert_same
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from steersman.config.manifest import Lora
from steersman.nn import fused_layers, gpu_kernels, packed_attention
from steersman.nn.forward import enable_packed, predicting_states
from steersman.nn.fused_layers import fuse_layers
from steersman.nn.kernels import kernels_of
from steersman.nn.logprobs import token_logprobs
from steersman.nn.packed import PackedBatch, pack
from training.online.policy_model import PolicyModel

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; `make gpu-check` runs this")


def built(family: Any, config: Any, **sizes: Any) -> Any:
    torch.manual_seed(0)
    model = family(config(**SIZES | sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0.9, 0.3)
    return model


def packed_batch(device: str = "cpu") -> PackedBatch:
    generator = np.random.default_rng(0)
    groups = [
        (generator.integers(3, 64, prompt), [generator.integers(3, 64, length) for length in answers])
        for prompt, answers in ((7, (5, 9, 1)), (4, (12, 3)))
    ]
    return pack(groups, device)


@pytest.mark.parametrize(
    ("family", "config", "found"),
    [
        (LlamaForCausalLM, LlamaConfig, {"norms": 5, "rotations": 2, "gates": 2, "layers": 2}),
        (Qwen3ForCausalLM, Qwen3Config, {"norms": 9, "rotations": 2, "gates": 2, "layers": 2}),
        # Norms that add 1 to the weight, another activation.
        (Gemma2ForCausalLM, Gemma2Config, {"norms": 0, "rotations": 2, "gates": 0, "layers": 0}),
        # Branches are scaled before they are added.
        (GraniteForCausalLM, GraniteConfig, {"norms": 5, "rotations": 2, "gates": 2, "layers": 0}),
        # Norms after the branches.
        (Olmo2ForCausalLM, Olmo2Config, {"norms": 9, "rotations": 2, "gates": 2, "layers": 0}),
        # Queries, keys and values in one product, gate and up in another.
        (Phi3ForCausalLM, Phi3Config, {"norms": 5, "rotations": 2, "gates": 0, "layers": 2}),
        (Qwen2MoeForCausalLM, Qwen2MoeConfig, None),
    ],
)
def test_values_and_gradients_stay(family: Any, config: Any, found: dict[str, int] | None) -> None:
    scaled = {"residual_multiplier": 0.5} if family is GraniteForCausalLM else {}
    model = built(family, config, **scaled)
    fused = copy.deepcopy(model)
    exchanged = fuse_layers(fused)
    if found is not None:
        assert exchanged == found
    assert fuse_layers(copy.deepcopy(model)) == exchanged
    both = []
    for one in (model, fused):
        enable_packed(one)
        states = predicting_states(one, packed_batch())
        states.square().sum().backward()
        both.append(states.detach())
    assert_same(both[1], both[0])
    wanted, found_grads = (
        {name: parameter.grad for name, parameter in one.named_parameters() if parameter.grad is not None}
        for one in (model, fused)
    )
    assert_same(found_grads, wanted)


def test_under_autocast_the_products_read_rounded_numbers() -> None:
    model = built(LlamaForCausalLM, LlamaConfig)
    exact, fused = copy.deepcopy(model), copy.deepcopy(model)
    fuse_layers(fused)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted = exact(ids).logits.log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = (one(ids).logits.float().log_softmax(-1) for one in (model, fused))
        assert fused.model.norm(torch.randn(1, 3, 32)).dtype == torch.bfloat16
    assert (after - wanted).abs().mean() < 1.2 * (before - wanted).abs().mean()


def test_a_branch_in_fp32_is_not_rounded_under_autocast() -> None:
    norm = built(LlamaForCausalLM, LlamaConfig).model.norm
    stream, branch = (torch.randn(1, 3, 32, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        total, normed = fused_layers.add_norm(stream, branch, norm)
    assert torch.equal(total, stream + branch)
    (total.square().sum() + normed.float().sum()).backward()
    assert branch.grad is not None
    assert torch.equal(branch.grad, stream.grad)


def test_branches_are_restored_after_a_layer_was_tried() -> None:
    model = built(LlamaForCausalLM, LlamaConfig)
    fuse_layers(model)
    for layer in model.model.layers:
        assert layer.mlp.forward.__func__.__name__ == "_gated"
        assert "forward" not in layer.self_attn.__dict__ or layer.self_attn.forward.__func__.__name__ == "forward"


# What kernels compute.


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
@pytest.mark.parametrize("family", [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_an_update_by_kernels_errs_no_more_than_one_without(
    device: str, family: Any, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities and every gradient against a CPU in fp32 without kernels: in fp32 they agree; in bf16 both
    round, by chance now one more and now the other, so that only means over several draws compare."""
    assert kernels_of(torch.ones(1, device=device)) is not None

    def gradients(device: str, precision: str, seed: int) -> dict[str, torch.Tensor]:
        model = PolicyModel(
            built(*family).to(device), lora, None, None, device=device, precision=precision, temperature=0.8, seed=0
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        batch = packed_batch(device)
        weights = torch.randn(len(batch.targets), generator=generator).to(device)
        logprobs = model(batch).logprobs
        (logprobs * weights).sum().backward()
        found = {name: one.grad.float().cpu() for name, one in model.named_parameters() if one.grad is not None}
        return {"logprobs": logprobs.detach().cpu()} | found

    def without_kernels(part: pytest.MonkeyPatch) -> None:
        for module in (fused_layers, packed_attention):
            part.setattr(module, "kernels_of", lambda *of: None)

    with monkeypatch.context() as part:
        without_kernels(part)
        wanted = [gradients("cpu", "fp32", seed) for seed in range(8)]

    def errors(precision: str) -> list[dict[str, float]]:
        found = [gradients(device, precision, seed) for seed in range(8)]
        assert [one.keys() for one in found] == [one.keys() for one in wanted]
        return [
            {name: float((one[name] - value).norm() / value.norm()) for name, value in right.items()}
            for one, right in zip(found, wanted, strict=True)
        ]

    exact, fused = errors("fp32"), errors("bf16")
    assert max(max(one.values()) for one in exact) < 3e-4
    without_kernels(monkeypatch)
    plain = errors("bf16")
    mean, without = (np.mean([list(one.values()) for one in found]) for found in (fused, plain))
    assert mean < 1.5 * without


@pytest.mark.gpu
@NO_CUDA
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sums_over_a_large_vocabulary(trained: bool, temperature: float) -> None:
    """Several blocks of the vocabulary, the last one not full, and logits far from zero."""
    torch.manual_seed(0)
    hidden, bias = torch.randn(37, 24, dtype=torch.float64), 4.0 * torch.randn(9001, dtype=torch.float64) - 30.0
    weight, targets = torch.randn(9001, 24, dtype=torch.float64), torch.randint(0, 9001, (37,))
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)]
    wanted = ((hidden @ weight.T + bias) / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    given = [one.detach().float().cuda().requires_grad_(one.requires_grad) for one in leaves]
    found, _ = token_logprobs(
        given[0], given[1], targets.cuda(), bias=given[2], temperature=temperature, chunk_tokens=16
    )
    assert torch.allclose(found.double().cpu(), wanted, rtol=1e-5, atol=1e-4)
    slopes = torch.randn(37, dtype=torch.float64)
    (wanted * slopes).sum().backward()
    (found * slopes.float().cuda()).sum().backward()
    for one, other in zip(given, leaves, strict=True):
        if other.requires_grad:
            assert one.grad is not None
            assert other.grad is not None
            assert (one.grad.double().cpu() - other.grad).norm() < 1e-5 * other.grad.norm()


def test_a_machine_without_a_compiler_goes_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu_kernels, "triton", object())
    monkeypatch.setattr(gpu_kernels, "swiglu", broken)
    cpu = torch.ones(1)
    monkeypatch.setattr(torch, "ones", lambda *args, **options: cpu)
    assert not gpu_kernels._compiles.__wrapped__()
    assert not gpu_kernels.usable(cpu)
