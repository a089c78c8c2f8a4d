"""Norms of the residual stream as one kernel: the same numbers, and only where the module computes just that."""

from __future__ import annotations

import copy

import pytest
import torch
from numeric import assert_same
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from steersman.nn.fused_norms import fuse_norms

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def built(family: type, config: type) -> nn.Module:
    torch.manual_seed(0)
    model = family(config(**SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0.9, 0.3)
    return model


@pytest.mark.parametrize(
    ("family", "config", "norms"),
    [(LlamaForCausalLM, LlamaConfig, 5), (Qwen3ForCausalLM, Qwen3Config, 9), (Gemma2ForCausalLM, Gemma2Config, 0)],
)
def test_values_and_gradients_stay(family: type, config: type, norms: int) -> None:
    model = built(family, config)
    fused = copy.deepcopy(model)
    assert fuse_norms(fused) == norms
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    found = [one(ids).logits.log_softmax(-1)[:, :, 3] for one in (model, fused)]
    for logprobs in found:
        logprobs.sum().backward()
    assert_same(found[1].detach(), found[0].detach())
    for (name, one), other in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5), name


def test_under_autocast_the_products_read_rounded_numbers() -> None:
    model = built(LlamaForCausalLM, LlamaConfig)
    exact, fused = copy.deepcopy(model), copy.deepcopy(model)
    fuse_norms(fused)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted = exact(ids).logits.log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = (one(ids).logits.float().log_softmax(-1) for one in (model, fused))
        assert fused.model.norm(torch.randn(1, 3, 32)).dtype == torch.bfloat16
    assert (after - wanted).abs().mean() < 1.2 * (before - wanted).abs().mean()
