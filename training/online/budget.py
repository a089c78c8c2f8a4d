"""How many tokens a forward pass takes, where the manifest leaves it open."""

from __future__ import annotations

from typing import Any

import torch

from steersman.nn.forward import unwrapped

ON_A_CPU = 4096
_MOST, _STEP = 32_768, 1024
_SHARE = 0.6
"""Of the memory that is left: services on the same device take more of it later, and batches differ."""
_BESIDE = 4 * 2**30
"""Bytes for the chunks of the output layer."""


def micro_batch_tokens(model: Any, world: int = 1) -> int:
    """Tokens of a micro-batch of a `PolicyModel`: 4096, on a GPU as many as fit.

    Short passes over a small model leave a GPU waiting for the next kernel to be started. Several ranks cut a batch in
    the same way, whatever is free on their devices.
    """
    if model.device == "cpu" or world > 1:
        return ON_A_CPU
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return fitting_tokens(model, free)


def fitting_tokens(model: Any, free: int) -> int:
    """Tokens whose activations take a share of what is left of the free bytes beside gradients and Adam's moments."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad and one.grad is None)
    parts = [model.policy] if model.critic is None else [model.policy, model.critic]
    room = _SHARE * (free - 12 * trained - _BESIDE)
    tokens = int(room / sum(_bytes_per_token(unwrapped(one).config, model.precision) for one in parts))
    return min(max(tokens // _STEP * _STEP, ON_A_CPU), _MOST)


def _bytes_per_token(config: Any, precision: str) -> int:
    """Of what the layers keep for the backward pass: in bf16 24 bytes a number of the stream and 6 of the MLP's inner
    one, measured of a Llama with LoRA."""
    text = config.get_text_config(decoder=True)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    inner *= getattr(text, "num_experts_per_tok", None) or 1
    found = text.num_hidden_layers * (24 * text.hidden_size + 6 * inner)
    return found if precision == "bf16" else 2 * found
