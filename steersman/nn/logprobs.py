"""Log-probabilities of chosen tokens straight from hidden states, without ever holding [tokens, vocabulary] logits.

    z = h W^T + b,   z <- softcap * tanh(z / softcap) (optional),   z <- z / temperature
    logprob = z_target - logsumexp(z),   entropy = -sum_v p_v log p_v,   p = softmax(z)

The rows are taken in chunks. Extra memory is a few times chunk_tokens * vocabulary * 4 bytes (and a [vocabulary,
hidden] in fp32 where the head itself is trained). Where only the hidden states are trained, as with LoRA, the forward
pass computes their gradient, too, because for one token it is known but for a factor,

    d logprob / d h = (W[target] - sum_v p_v W[v]) / temperature

and backward multiplies. Otherwise backward computes each chunk's logits again.

The matrix product runs in the dtype that the head has in the model (the autocast dtype where autocast is on) and
everything after it in fp32, so trainer and engine see the same logits. The reference is `log_softmax` + `gather`, as
`logprobs_from_logits` and `entropy_from_logits` in lm-human-preferences utils/core.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steersman.errors import InvalidArgumentError
from steersman.nn.kernels import kernels_of
from steersman.nn.top_p import pack_sets, top_p_sets, unpack_sets


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    sets: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(log-probabilities fp32 [T], entropies fp32 [T] in nats or None) of the next token at each position.

    hidden [T, D] are the last hidden states (after the final norm) at the positions that PREDICT `targets` int64 [T];
    weight [V, D] and bias [V] are the LM head's (plain tensors, not sharded ones). `temperature` is the one the tokens
    were sampled with; `softcap` is Gemma's `final_logit_softcapping`; a model with a logit scale takes hidden * scale.
    `sets` uint8 [T, ceil(V / 8)] (`top_p_sets_of`) are the tokens that make up the distribution, None: all of them.
    `chunk_tokens` None: 512, on a GPU as many as have 1 GiB of logits in fp32. Gradients flow to hidden, weight and
    bias from both outputs. fp64 input is computed in fp64.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise InvalidArgumentError(f"hidden {list(hidden.shape)} must be [T, D] and targets {list(targets.shape)} [T]")
    if not temperature > 0.0:
        raise InvalidArgumentError(f"temperature must be above 0 for log-probabilities, got {temperature}")
    if sets is not None and with_entropy:
        raise InvalidArgumentError("entropies are of the whole distribution; ask for them without sets")
    dtype = _dtype(hidden, weight)
    chunk = max(1, _chunk_tokens(weight) if chunk_tokens is None else chunk_tokens)
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if frozen and hidden.requires_grad and torch.is_grad_enabled() and softcap is None and not with_entropy:
        return _FrozenHeadLogprobs.apply(hidden, weight, bias, targets, temperature, sets, chunk, dtype), None
    logprobs, entropy = _ChunkedLogprobs.apply(
        hidden, weight, bias, targets, temperature, softcap, with_entropy, sets, chunk, dtype
    )
    return logprobs, entropy if with_entropy else None


@torch.no_grad()
def top_p_sets_of(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    top_p: float,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = 512,
) -> Tensor:
    """The top-p set of the distribution at each position, and its target: uint8 [T, ceil(V / 8)], see `nn.top_p`.

    Arguments as `token_logprobs` has them.
    """
    dtype = _dtype(hidden, weight)
    found = torch.empty(len(hidden), -(-weight.shape[0] // 8), dtype=torch.uint8, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            sets = top_p_sets(_logits(hidden[rows].to(dtype), head, offset, temperature, softcap), top_p)
            found[rows] = pack_sets(sets.scatter_(1, targets[rows, None], True))
    return found


def _chunk_tokens(weight: Tensor) -> int:
    """A GPU wants large products, and passes over the head's gradient between them few."""
    return max(512, 2**28 // len(weight)) if weight.is_cuda else 512


def _fused(logits: Tensor, sets: Tensor | None) -> bool:
    """Whether one kernel each makes the sums over the vocabulary and the slopes."""
    return sets is None and kernels_of(logits) is not None


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the matrix product."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _restricted(logits: Tensor, sets: Tensor | None, rows: slice) -> Tensor:
    """The logits, in place -inf outside of the sets."""
    return logits if sets is None else logits.masked_fill_(~unpack_sets(sets[rows], logits.shape[1]), -math.inf)


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    """[chunk, V] logits of the sampled distribution, at least fp32, in a buffer of its own."""
    return _of_distribution(torch.nn.functional.linear(rows, weight, bias), temperature, softcap)


def _of_distribution(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits if temperature == 1.0 else logits.div_(temperature)


class _FrozenHeadLogprobs(torch.autograd.Function):
    """Log-probabilities whose gradient reaches the hidden states only; [T, D] of it is kept instead of logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        sets: Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        accumulate = torch.promote_types(dtype, torch.float32)
        logprobs = torch.empty(hidden.shape[0], dtype=accumulate, device=hidden.device)
        slope = torch.empty(hidden.shape, dtype=accumulate, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                logits = torch.nn.functional.linear(hidden[rows].to(dtype), head, offset)
                if _fused(logits, sets):
                    lse, logprobs[rows] = kernels_of(logits).row_stats(logits, targets[rows], temperature)
                    one = torch.ones_like(lse)
                    slope[rows] = kernels_of(logits).row_slope_(logits, targets[rows], lse, one, temperature) @ head
                    continue
                logits = _of_distribution(logits, temperature, None)
                log_p = _restricted(logits, sets, rows).log_softmax(-1)
                logprobs[rows] = log_p.gather(-1, targets[rows, None]).squeeze(-1)
                slope[rows] = head[targets[rows]]
                slope[rows] -= log_p.exp_().to(dtype) @ head
                if temperature != 1.0:
                    slope[rows] /= temperature
        ctx.save_for_backward(slope)
        ctx.dtype = hidden.dtype
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(ctx.dtype), *[None] * 7


class _ChunkedLogprobs(torch.autograd.Function):
    """See the module docstring; inputs and outputs as `token_logprobs`, `dtype` is that of the matrix product."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        with_entropy: bool,
        sets: Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        accumulate = torch.promote_types(dtype, torch.float32)
        lse = torch.empty(hidden.shape[0], dtype=accumulate, device=hidden.device)
        logprobs = torch.empty_like(lse)
        entropy = torch.empty_like(lse) if with_entropy else lse.new_empty(0)
        plain = softcap is None and not with_entropy
        with torch.autocast(hidden.device.type, enabled=False):
            head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                logits = torch.nn.functional.linear(hidden[rows].to(dtype), head, offset)
                if plain and _fused(logits, sets):
                    lse[rows], logprobs[rows] = kernels_of(logits).row_stats(logits, targets[rows], temperature)
                    continue
                logits = _restricted(_of_distribution(logits, temperature, softcap), sets, rows)
                lse[rows] = logits.logsumexp(-1)
                logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - lse[rows]
                if with_entropy:
                    log_p = logits.sub_(lse[rows, None])
                    entropy[rows] = -log_p.exp().mul_(log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy, sets)
        ctx.options = (temperature, softcap, with_entropy, chunk, dtype)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy, sets = ctx.saved_tensors
        temperature, softcap, with_entropy, chunk, dtype = ctx.options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=lse.dtype, device=bias.device) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                states = hidden[rows].to(dtype)
                logits = torch.nn.functional.linear(states, head, offset)
                if softcap is None and not with_entropy and _fused(logits, sets):
                    of_rows = targets[rows], lse[rows], grad_logprobs[rows].contiguous()
                    grad = kernels_of(logits).row_slope_(logits, *of_rows, temperature)
                else:
                    logits = _of_distribution(logits, temperature, softcap)
                    log_p = logits - lse[rows, None] if softcap is not None else logits.sub_(lse[rows, None])
                    log_p = _restricted(log_p, sets, rows)
                    # d logprob / dz = onehot - p;  d entropy / dz = -p * (log p + entropy)
                    factor = -grad_logprobs[rows, None]
                    if with_entropy:
                        factor = factor - grad_entropy[rows, None] * (log_p + entropy[rows, None])
                    grad = log_p.exp_().mul_(factor)
                    grad.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None])
                    if temperature != 1.0:
                        grad.div_(temperature)
                    if softcap is not None:
                        grad.mul_(1.0 - (logits * (temperature / softcap)).square())
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=grad_bias.dtype)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ head
                if grad_weight is not None:
                    grad_weight += grad.T @ states
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 7,
        )
