"""How many tokens a micro-batch takes where the manifest leaves it open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from training.online.budget import fitting_tokens, micro_batch_tokens

GIB = 2**30
ONE_B = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)


def model(trained: int = 0, precision: str = "bf16", critic: bool = False, device: str = "cuda") -> Any:
    """What a `PolicyModel` tells, with so many trained parameters that hold no memory."""
    parameters = [torch.nn.Parameter(torch.empty(trained, device="meta"))]
    policy = SimpleNamespace(config=ONE_B)
    return SimpleNamespace(
        device=device, precision=precision, policy=policy, critic=policy if critic else None,
        parameters=lambda: iter(parameters),
    )  # fmt: skip


def test_a_cpu_and_several_ranks_take_a_fixed_number() -> None:
    assert micro_batch_tokens(model(device="cpu")) == 4096
    assert micro_batch_tokens(model(), world=2) == 4096


@pytest.mark.parametrize(
    ("free", "settings", "tokens"),
    [
        # 16 layers of 24 * 2048 + 6 * 8192 bytes are 1.5 MiB a token: 0.6 * (64 - 4) GiB / 1.5 MiB = 24,576.
        (64 * GIB, {}, 24_576),
        (64 * GIB, {"critic": True}, 12_288),
        (64 * GIB, {"precision": "fp32"}, 12_288),
        # Gradients and Adam's moments of 1,073,741,824 parameters take 12 GiB: 0.6 * 48 GiB / 1.5 MiB = 19,660.
        (64 * GIB, {"trained": GIB}, 19_456),
        (5 * GIB, {}, 4096),
        (600 * GIB, {}, 32_768),
    ],
)
def test_as_many_as_the_memory_takes(free: int, settings: dict[str, Any], tokens: int) -> None:
    assert fitting_tokens(model(**settings), free) == tokens
