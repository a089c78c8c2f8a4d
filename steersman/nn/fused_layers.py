"""What lies between the matrix products of a decoder layer, with fewer passes over memory and fewer calls.

transformers computes an RMS norm in seven passes over fp32 numbers, a rotation in eleven, the gate of an MLP in two and
the sum with the residual stream in one more, each with its own kernel and twice as many backward; under autocast every
product that reads a result rounds it once more. On a GPU that is half of a training step of a small model, on a CPU a
quarter. Here each of them is one kernel (`gpu_kernels`, `cpu_kernels`) that writes what the next product reads.

Nothing goes by a family's name: which modules compute just this is found by computing, and the others stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steersman.nn.kernels import kernels_of


def fuse_layers(model: nn.Module) -> dict[str, int]:
    """Gives norms, rotations, gates and layers of a model the fused passes, in place; returns how many of each."""
    found = {"norms": 0, "rotations": 0, "gates": 0, "layers": 0}
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module).__name__.endswith("RMSNorm") and _is_plain_norm(module):
            _exchange(module, _norm)
            found["norms"] += 1
    for module in modules:
        if _turns(module):
            found["rotations"] += 1
        if _is_gated(module):
            _exchange(module, _gated)
            found["gates"] += 1
        if _is_pre_norm_layer(module):
            _exchange(module, _layer)
            found["layers"] += 1
    return found


def _exchange(module: Any, forward: Callable[..., Any]) -> None:
    module.steersman_own = module.forward
    module.forward = types.MethodType(forward, module)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Of the products that read x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# Norms and the residual stream.


def _epsilon(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, (int, float)) else None


@torch.no_grad()
def _is_plain_norm(module: Any) -> bool:
    """Whether it computes x / rms(x) * weight: Gemma's, of the same name, adds 1 to the weight."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.dtype != torch.float32 or epsilon is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x = 1e-2 * torch.randn(1, 3, len(weight), generator=generator).to(weight.device)  # small, so that epsilon is seen
    try:
        own = module(x)
    except Exception:  # it wants something beside the stream, such as a gate
        return False
    return torch.allclose(own, F.rms_norm(x, weight.shape, weight, epsilon), rtol=1e-5, atol=1e-6)


def _norm(self: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:  # of heads, whose rounding is the model's own
        own: Tensor = self.steersman_own(x)
        return own
    return add_norm(x, None, self)[1]


def add_norm(stream: Tensor, branch: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """(stream + branch, its norm in the dtype of the products) of fp32 [..., D] and what a branch gave [..., D]."""
    weight, epsilon, dtype = norm.weight, _epsilon(norm) or 0.0, _product_dtype(stream)
    kernels = kernels_of(stream, dtype)
    if kernels is not None and kernels.fits_a_row(stream.shape[-1]):
        branch = None if branch is None else branch.contiguous()
        found: tuple[Tensor, Tensor] = _AddNorm.apply(stream.contiguous(), branch, weight, epsilon, dtype)
        return found
    stream = stream if branch is None else stream + branch
    return stream, F.rms_norm(stream, weight.shape, weight, epsilon).to(dtype)


class _AddNorm(torch.autograd.Function):
    """See `add_norm`."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total, normed, rstd = kernels_of(stream).add_norm(stream, branch, weight, epsilon, dtype)
        ctx.save_for_backward(total, weight, rstd)
        ctx.branch = None if branch is None else branch.dtype
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        of_total, of_normed = (grad.contiguous() for grad in grads)
        of_weight = ctx.needs_input_grad[2]
        kernels = kernels_of(total)
        found = kernels.add_norm_back(total, weight, rstd, of_total, of_normed, ctx.branch, of_weight=of_weight)
        return *found, None, None


def _is_pre_norm_layer(module: Any) -> bool:
    """Whether it is x + attention(norm(x)), then x + mlp(norm(x)), whatever both branches compute."""
    parts = [getattr(module, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    branches = [getattr(module, name, None) for name in ("self_attn", "mlp")]
    if not all(isinstance(one, nn.Module) for one in (*parts, *branches)) or "forward" in module.__dict__:
        return False
    if any("steersman_own" not in one.__dict__ for one in parts if one is not None) or _drops(module):
        return False
    weight: Tensor = module.input_layernorm.weight
    x = torch.randn(1, 3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    before = [one.__dict__.get("forward") for one in branches if one is not None]
    try:
        module.self_attn.forward = lambda hidden_states, **options: (2.0 * hidden_states.cos(), None)
        module.mlp.forward = lambda x: 3.0 * x.sin()
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            own, ours = module(x, position_embeddings=None), _layer(module, x, position_embeddings=None)
        return isinstance(own, Tensor) and torch.allclose(own, ours, rtol=1e-4, atol=1e-5)
    except Exception:  # a layer of another kind
        return False
    finally:
        for one, forward in zip(branches, before, strict=True):
            if forward is None:
                one.__dict__.pop("forward", None)
            else:
                one.forward = forward  # type: ignore[union-attr]


def _drops(module: nn.Module) -> bool:
    """Whether it drops out numbers of its own, which nothing shows that is computed for evaluation."""
    return any(isinstance(one, nn.Dropout) and one.p > 0.0 for one in module.children())


def _layer(self: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
    if args or hidden_states.dtype != torch.float32:
        return self.steersman_own(hidden_states, *args, **options)
    stream, normed = add_norm(hidden_states, None, self.input_layernorm)
    branch = self.self_attn(hidden_states=normed, **options)[0]
    stream, normed = add_norm(stream, branch, self.post_attention_layernorm)
    return stream + self.mlp(normed)


# The gate of an MLP.


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether it computes down(silu(gate(x)) * up(x))."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(one, nn.Module) for one in parts) or "forward" in module.__dict__ or _drops(module):
        return False
    width = getattr(module.gate_proj, "in_features", None)
    if not isinstance(width, int):
        return False
    weight = module.gate_proj.weight
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        own, ours = module(x).float(), _gated(module, x).float()
        same = torch.allclose(module.act_fn(x), F.silu(x))
    except Exception:  # it wants more than x
        return False
    rounding = 1e-4 if weight.dtype == torch.float32 else 3e-2
    return same and own.shape == ours.shape and bool((own - ours).abs().max() <= rounding * own.abs().max())


def _gated(self: Any, x: Tensor) -> Any:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if kernels_of(gate) is not None and gate.dtype == up.dtype:
        found: Tensor = _SwiGLU.apply(gate.contiguous(), up.contiguous())
        return found
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels_of(gate).swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return kernels_of(gate).swiglu_back(gate, up, grads[0].contiguous())


# The rotation of queries and keys.

_ROTATION = "apply_rotary_pos_emb"


def _turns(module: Any) -> bool:
    """Gives an attention layer whose code turns queries and keys by halves the fused rotation; whether it is one.

    It is a function of the family's file, so the layer gets its own forward with another one in its place.
    """
    own: Any = inspect.unwrap(type(module).forward)
    if "forward" in module.__dict__ or _ROTATION not in getattr(getattr(own, "__code__", None), "co_names", ()):
        return False
    rotation = own.__globals__.get(_ROTATION)
    if rotation is None or not _turns_halves(rotation):
        return False
    forward = types.FunctionType(
        own.__code__,
        {**own.__globals__, _ROTATION: functools.partial(_rotated, rotation)},
        own.__name__,
        own.__defaults__,
        own.__closure__,
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    module.forward = types.MethodType(forward, module)
    return True


@functools.cache
@torch.no_grad()
def _turns_halves(rotation: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=generator) for shape in _EXAMPLE)
    try:
        found = rotation(q, k, cos, sin)
    except Exception:  # it wants other angles
        return False
    return all(torch.allclose(one, _half_rotation(x, cos, sin)) for one, x in zip(found, (q, k), strict=True))


_EXAMPLE = ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))


def _half_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _rotated(
    own: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D] and k [B, KV, T, D] turned by cos and sin [B, T, D], as `own` does it."""
    one_row = not (args or more) and len(q) == 1 and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
    if not one_row or q.stride(-1) != 1 or k.stride(-1) != 1 or kernels_of(q, k.dtype, cos.dtype) is None:
        return own(q, k, cos, sin, *args, **more)
    dtype = _product_dtype(q) if torch.is_autocast_enabled(q.device.type) else torch.promote_types(q.dtype, cos.dtype)
    cos, sin = cos.contiguous(), sin.contiguous()
    return _Rotation.apply(q, cos, sin, dtype), _Rotation.apply(k, cos, sin, dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return kernels_of(x).rotate(x, cos, sin, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return kernels_of(grad).rotate(grad, cos, sin, ctx.dtype, back=True), None, None, None
