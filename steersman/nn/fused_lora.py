"""LoRA's product without its detours.

    y = x W^T + b + s (x A^T) B^T

PEFT adds the second product to the first by two passes over the whole output, and its backward pass makes two more.
On a CPU these passes cost a sixth of a training step. Here the low-rank products accumulate into the buffers of the
large ones. Same value, same gradients.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse_lora(model: nn.Module) -> None:
    """Gives every plain LoRA layer of a PEFT model the fused product, in place.

    A layer goes back to PEFT's own code whenever it is more than plain LoRA: DoRA, dropout, several or disabled or
    merged adapters, quantized weights.
    """
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = self.active_adapters
    plain = (
        not (args or kwargs or self.disable_adapters or self.merged)
        and len(adapters) == 1
        and adapters[0] in self.lora_A
        and not self.lora_variant
        and not self.lora_bias[adapters[0]]
        and isinstance(self.lora_dropout[adapters[0]], nn.Identity)
    )
    if not plain:
        return LoraLinear.forward(self, x, *args, **kwargs)
    name = adapters[0]
    base = self.base_layer
    # Views are made here: a caller may change the result in place (OLMo's `clip_qkv`, Llama 4's experts).
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _LoraProduct.apply(
        rows, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    )
    return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)


class _LoraProduct(torch.autograd.Function):
    """x [N, in], weight [out, in], bias [out] or None, a [rank, in], b [out, rank] -> [N, out].

    Weight and bias are frozen. Under autocast the products run in its dtype, as those of `nn.Linear` do.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            rows = x.to(dtype)
            scaled = (b * scaling).to(dtype)
            low = rows @ a.to(dtype).T
            out = nn.functional.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
            out.addmm_(low, scaled.T)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling, ctx.x_dtype = scaling, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        dtype = rows.dtype
        with torch.autocast(rows.device.type, enabled=False):
            grad = grads[0].to(dtype)
            grad_low = grad @ (b * ctx.scaling).to(dtype)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ weight.to(dtype)).addmm_(grad_low, a.to(dtype)).to(ctx.x_dtype)
            grad_a = (grad_low.T @ rows).to(a.dtype)
            grad_b = (grad.T @ low).to(b.dtype).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None
