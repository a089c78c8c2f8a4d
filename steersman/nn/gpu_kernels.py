"""Passes over memory that a training step makes between its matrix products, each as one kernel (Triton, CUDA only).

What torch computes in four to twenty passes over numbers in fp32 is here one read and one write in the dtype that the
next product wants; sums are in fp32. The references are the plain tensor operations in `fused_layers` and `logprobs`,
which do the same elsewhere. Triton comes with torch's CUDA builds; where it or a C compiler is missing, `usable` says
no.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("steersman.nn")

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch
    triton = None

_WIDEST = 16_384
"""Numbers of a row that a program holds at once."""
_BLOCK = 4096


def usable(tensor: Tensor) -> bool:
    """Whether kernels can run on what this tensor is."""
    return tensor.is_cuda and _compiles()


@functools.cache
def _compiles() -> bool:
    if triton is None:
        return False
    try:
        one = torch.ones(16, device="cuda")
        swiglu(one, one)
    except Exception as error:  # whatever a missing compiler makes of it
        log.warning("fused kernels are left out, steps take longer: %s", str(error).strip().splitlines()[-1:])
        return False
    return True


def fits_a_row(width: int) -> bool:
    return width <= _WIDEST


if triton is not None:

    @triton.jit
    def _row_stats(logits, targets, lse, chosen, vocab, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        logits += row * vocab
        most = tl.full([BLOCK], -1e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + column, mask=column < vocab, other=-1e30).to(tl.float32) * scale
            new = tl.maximum(most, z)
            total = total * tl.exp(most - new) + tl.exp(z - new)
            most = new
        top = tl.max(most, 0)
        found = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
        tl.store(lse + row, found)
        target = tl.load(targets + row)
        tl.store(chosen + row, tl.load(logits + target).to(tl.float32) * scale - found)

    @triton.jit
    def _row_slope(logits, targets, lse, factor, vocab, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < vocab
        place = logits + row * vocab + column
        p = tl.exp(tl.load(place, mask=inside, other=0.0).to(tl.float32) * scale - tl.load(lse + row))
        slope = tl.where(column == tl.load(targets + row), 1.0 - p, -p) * (tl.load(factor + row) * scale)
        tl.store(place, slope.to(logits.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu_back(gate, up, grad, grad_gate, grad_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        tl.store(grad_up + place, (d * g * s).to(grad_up.dtype.element_ty), mask=inside)
        tl.store(grad_gate + place, (d * u * s * (1.0 + g * (1.0 - s))).to(grad_gate.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotate(  # type: ignore[no-untyped-def]
        x, out, cos, sin, heads, half, of_token, of_head,
        BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
        inside = (head < heads) & (column < half)
        x += token * of_token + head * of_head + column
        a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
        cos += token * 2 * half + column
        sin += token * 2 * half + column
        c1 = tl.load(cos, mask=column < half, other=0.0).to(tl.float32)
        c2 = tl.load(cos + half, mask=column < half, other=0.0).to(tl.float32)
        s1 = tl.load(sin, mask=column < half, other=0.0).to(tl.float32)
        s2 = tl.load(sin + half, mask=column < half, other=0.0).to(tl.float32)
        if BACK:
            first = a * c1 + b * s2
            second = b * c2 - a * s1
        else:
            first = a * c1 - b * s1
            second = b * c2 + a * s2
        out += (token * heads + head) * 2 * half + column
        tl.store(out, first.to(out.dtype.element_ty), mask=inside)
        tl.store(out + half, second.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm(  # type: ignore[no-untyped-def]
        stream, branch, weight, total, out, rstd, width, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(stream + row * width + column, mask=inside, other=0.0)
        if ADD:
            x += tl.load(branch + row * width + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + row * width + column, x, mask=inside)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + epsilon)
        tl.store(rstd + row, scale)
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + column, (x * scale * w).to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["rows"])
    def _norm_back(  # type: ignore[no-untyped-def]
        total, weight, rstd, grad_total, grad_out, grad_stream, grad_branch, grad_weight, rows, width,
        BRANCH: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, BLOCK)
        inside = column < width
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        of_weight = tl.zeros([BLOCK], tl.float32)
        wide = tl.zeros([BLOCK], tl.int64) + width
        for number in range(tl.program_id(0), rows, tl.num_programs(0)):
            place = number * wide + column
            scale = tl.load(rstd + number)
            normed = tl.load(total + place, mask=inside, other=0.0) * scale
            d = tl.load(grad_out + place, mask=inside, other=0.0).to(tl.float32)
            if WEIGHT:
                of_weight += d * normed
            d *= w
            d = scale * (d - normed * (tl.sum(d * normed, 0) / width))
            d += tl.load(grad_total + place, mask=inside, other=0.0)
            tl.store(grad_stream + place, d, mask=inside)
            if BRANCH:
                tl.store(grad_branch + place, d.to(grad_branch.dtype.element_ty), mask=inside)
        if WEIGHT:
            tl.store(grad_weight + tl.program_id(0) * width + column, of_weight, mask=inside)

    @triton.jit
    def _gather_rows(  # type: ignore[no-untyped-def]
        x, table, out, length, heads, width, of_row, of_head, HEADS: tl.constexpr, WIDTH: tl.constexpr
    ):
        place = tl.program_id(0).to(tl.int64)
        row = tl.load(table + place)
        head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        inside = (head < heads) & (column < width)
        value = tl.load(x + row * of_row + head * of_head + column, mask=inside & (row >= 0), other=0.0)
        out += ((place // length * heads + head) * length + place % length) * width + column
        tl.store(out, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _scatter_rows(  # type: ignore[no-untyped-def]
        x, table, out, length, heads, fold, width, of_block, of_head, of_row,
        HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0).to(tl.int64)
        row = tl.load(table + place)
        head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        inside = (head < heads) & (column < width) & (row >= 0)
        x += place // length * of_block + head // fold * of_head
        x += (head % fold * length + place % length) * of_row + column
        out += (row * heads + head) * width + column
        tl.store(out, tl.load(x, mask=inside, other=0.0).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _add_blocks(  # type: ignore[no-untyped-def]
        x, table, first, last, out, length, heads, width, of_block, of_head, of_row,
        HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0).to(tl.int64)
        row = tl.load(table + place)
        head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        inside = (head < heads) & (column < width) & (row >= 0)
        x += head * of_head + place % length * of_row + column
        out += (row * heads + head) * width + column
        total = tl.load(out, mask=inside, other=0.0)
        for block in range(tl.load(first + place // length), tl.load(last + place // length)):
            total += tl.load(x + block * of_block, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total, mask=inside)


def row_stats(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logsumexp, log-probability of the target) fp32 [T], of logits [T, V] over the temperature; targets int64 [T]."""
    lse, chosen = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    if len(logits):
        _row_stats[(len(logits),)](
            logits, targets, lse, chosen, logits.shape[1], 1.0 / temperature, BLOCK=_BLOCK, num_warps=8
        )
    return lse, chosen


def row_slope_(logits: Tensor, targets: Tensor, lse: Tensor, factor: Tensor, temperature: float) -> Tensor:
    """Turns logits [T, V] in place into factor [T] times the gradient of the target's log-probability by them."""
    if len(logits):
        grid = (len(logits), triton.cdiv(logits.shape[1], _BLOCK))
        _row_slope[grid](logits, targets, lse, factor, logits.shape[1], 1.0 / temperature, BLOCK=_BLOCK, num_warps=8)
    return logits


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, contiguous and of one shape."""
    out = torch.empty_like(gate)
    _swiglu[(triton.cdiv(gate.numel(), 1024),)](gate, up, out, gate.numel(), BLOCK=1024)
    return out


def swiglu_back(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by gate and up."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_back[(triton.cdiv(gate.numel(), 1024),)](gate, up, grad, of_gate, of_up, gate.numel(), BLOCK=1024)
    return of_gate, of_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, *, back: bool = False) -> Tensor:
    """x [1, H, T, D], its last dimension contiguous, turned by the angles of cos and sin [1, T, D]; `back`: the
    gradient by x of what was turned. The result lies in memory as [T, H, D]."""
    _, heads, tokens, width = x.shape
    out = torch.empty((1, tokens, heads, width), dtype=dtype, device=x.device)
    _rotate[(tokens,)](
        x, out, cos, sin, heads, width // 2, x.stride(2), x.stride(1), BACK=back,
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(width // 2),
    )  # fmt: skip
    return out.transpose(1, 2)


def add_norm(
    stream: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of fp32 rows [..., D] and what is added to them: (sum fp32, x / rms(x) * weight in a dtype, 1 / rms [T])."""
    width = stream.shape[-1]
    total = stream if branch is None else torch.empty_like(stream)
    out = torch.empty(stream.shape, dtype=dtype, device=stream.device)
    rstd = torch.empty(stream.numel() // width, dtype=torch.float32, device=stream.device)
    _norm[(len(rstd),)](
        stream, branch, weight, total, out, rstd, width, epsilon, ADD=branch is not None, **_of_rows(width)
    )
    return total, out, rstd


def add_norm_back(
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_total: Tensor,
    grad_out: Tensor,
    branch: torch.dtype | None,
    *,
    of_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients by stream fp32, by the branch in its dtype, and by the weight."""
    width, device = total.shape[-1], total.device
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if total.is_cuda else 2
    stream = torch.empty_like(total)
    of_branch = None if branch is None else torch.empty(total.shape, dtype=branch, device=device)
    parts = torch.empty((programs, width), dtype=torch.float32, device=device) if of_weight else None
    _norm_back[(programs,)](
        total, weight, rstd, grad_total, grad_out, stream, of_branch, parts, len(rstd), width,
        BRANCH=branch is not None, WEIGHT=of_weight, **_of_rows(width),
    )  # fmt: skip
    return stream, of_branch, None if parts is None else parts.sum(0).to(weight.dtype)


def gather_rows(x: Tensor, table: Tensor) -> Tensor:
    """Rows of x [T, H, D], its last dimension contiguous, by a table int64 [B, L]: [B, H, L, D], 0 where it has -1."""
    (blocks, length), (_, heads, width) = table.shape, x.shape
    out = torch.empty((blocks, heads, length, width), dtype=x.dtype, device=x.device)
    _gather_rows[(table.numel(),)](
        x, table, out, length, heads, width, x.stride(0), x.stride(1), **_of_heads(heads, width)
    )
    return out


def scatter_rows_(out: Tensor, x: Tensor, table: Tensor) -> None:
    """Writes x [B, KV, H / KV * L, D] into the rows of a contiguous [T, H, D]; what has -1 in the table is left out."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    _, heads, width = out.shape
    _scatter_rows[(table.numel(),)](
        x, table, out, table.shape[1], heads, heads // x.shape[1], width, *x.stride()[:3], **_of_heads(heads, width)
    )


def add_blocks_(out: Tensor, x: Tensor, table: Tensor, first: Tensor, last: Tensor) -> None:
    """Adds to the rows of a contiguous fp32 [T, H, D] those of x [B, H, L, D] from block `first` to before `last`.

    `table` int64 [G, L]: the row for each group and place, -1: none; `first` and `last` int64 [G]. One order of sums,
    so that a step can be repeated.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    _, heads, width = out.shape
    _add_blocks[(table.numel(),)](
        x, table, first, last, out, table.shape[1], heads, width, *x.stride()[:3], **_of_heads(heads, width)
    )


def _of_heads(heads: int, width: int) -> dict[str, Any]:
    return {"HEADS": triton.next_power_of_2(heads), "WIDTH": triton.next_power_of_2(width)}


def _of_rows(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}
