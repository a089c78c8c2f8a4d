"""What `gpu_kernels` does for a GPU, for a CPU: the passes over memory between the matrix products of a training step.

torch takes four to twenty calls for each, and what a small step between two products costs is its calls. Numbers are
float32 or bfloat16, sums float32. The references are the plain tensor operations in `fused_layers`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.nn.compiled import BF16, F32, exp, kernel, largest, put, shared, wide
from steersman.nn.hardware import array_of

_IDS = "int64[::1]"


def fits_a_row(width: int) -> bool:
    return True


def _flat(x: Tensor, width: int) -> np.ndarray:
    return array_of(x.detach().reshape(-1, width).contiguous())


def _own(weight: Tensor) -> np.ndarray:
    """A copy: of what numpy has seen, FSDP can no longer let the memory go."""
    return weight.detach().clone().numpy()


# The softmax over the vocabulary.


@shared
def _sum_rows(
    number: int, of: int, logits: np.ndarray, targets: np.ndarray, scale: float, lse: np.ndarray, chosen: np.ndarray
) -> None:
    rows, vocab = logits.shape
    factor: Any = np.float32(scale)
    for row in range(rows * number // of, rows * (number + 1) // of):
        z: Any = logits[row]
        total: Any = np.float32(0)
        top = largest(z)
        for i in range(vocab):
            total += exp((wide(z[i]) - top) * factor)
        lse[row] = top * factor + np.log(total)
        chosen[row] = wide(z[targets[row]]) * factor - lse[row]


@shared
def _slope_rows(
    number: int, of: int, logits: np.ndarray, targets: np.ndarray, scale: float, lse: np.ndarray, factor: np.ndarray
) -> None:
    rows, vocab = logits.shape
    by = np.float32(scale)
    for row in range(rows * number // of, rows * (number + 1) // of):
        z, slope, target = logits[row], factor[row] * by, targets[row]
        own = slope * (np.float32(1) - exp(wide(z[target]) * by - lse[row]))
        for i in range(vocab):
            put(z, i, -slope * exp(wide(z[i]) * by - lse[row]))
        put(z, target, own)


_ROW_NUMBERS = f"{_IDS}, float64, float32[::1], float32[::1], int32"


@kernel(f"{F32}, {_ROW_NUMBERS}", f"{BF16}, {_ROW_NUMBERS}")
def _row_stats(
    logits: np.ndarray, targets: np.ndarray, scale: float, lse: np.ndarray, chosen: np.ndarray, threads: int
) -> None:
    _sum_rows((logits, targets, scale, lse, chosen), threads)


@kernel(f"{F32}, {_ROW_NUMBERS}", f"{BF16}, {_ROW_NUMBERS}")
def _row_slope(
    logits: np.ndarray, targets: np.ndarray, scale: float, lse: np.ndarray, factor: np.ndarray, threads: int
) -> None:
    _slope_rows((logits, targets, scale, lse, factor), threads)


def row_stats(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logsumexp, log-probability of the target) fp32 [T], of logits [T, V] over the temperature; targets int64 [T]."""
    lse, chosen = torch.empty(len(logits)), torch.empty(len(logits))
    arrays = array_of(logits.detach()), targets.contiguous().numpy()
    _row_stats(*arrays, 1.0 / temperature, lse.numpy(), chosen.numpy(), torch.get_num_threads())
    return lse, chosen


def row_slope_(logits: Tensor, targets: Tensor, lse: Tensor, factor: Tensor, temperature: float) -> Tensor:
    """Turns logits [T, V] in place into factor [T] times the gradient of the target's log-probability by them."""
    arrays = array_of(logits.detach()), targets.contiguous().numpy()
    numbers = lse.contiguous().numpy(), factor.detach().float().contiguous().numpy()
    _row_slope(*arrays, 1.0 / temperature, *numbers, torch.get_num_threads())
    return logits


# Gates.


@shared
def _gate_rows(number: int, of: int, gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    rows, width = gate.shape
    for row in range(rows * number // of, rows * (number + 1) // of):
        g, u, found = gate[row], up[row], out[row]
        for i in range(width):
            z = wide(g[i])
            put(found, i, z / (np.float32(1) + exp(-z)) * wide(u[i]))


@shared
def _gate_rows_back(
    number: int,
    of: int,
    gate: np.ndarray,
    up: np.ndarray,
    grad: np.ndarray,
    of_gate: np.ndarray,
    of_up: np.ndarray,
) -> None:
    rows, width = gate.shape
    one = np.float32(1)
    for row in range(rows * number // of, rows * (number + 1) // of):
        g, u, d, to_gate, to_up = gate[row], up[row], grad[row], of_gate[row], of_up[row]
        for i in range(width):
            z, slope = wide(g[i]), wide(d[i])
            s = one / (one + exp(-z))
            put(to_up, i, slope * z * s)
            put(to_gate, i, slope * wide(u[i]) * s * (one + z * (one - s)))


@kernel(f"{F32}, {F32}, {F32}, int32", f"{BF16}, {BF16}, {BF16}, int32")
def _swiglu(gate: np.ndarray, up: np.ndarray, out: np.ndarray, threads: int) -> None:
    _gate_rows((gate, up, out), threads)


@kernel(f"{F32}, {F32}, {F32}, {F32}, {F32}, int32", f"{BF16}, {BF16}, {BF16}, {BF16}, {BF16}, int32")
def _swiglu_back(
    gate: np.ndarray, up: np.ndarray, grad: np.ndarray, of_gate: np.ndarray, of_up: np.ndarray, threads: int
) -> None:
    _gate_rows_back((gate, up, grad, of_gate, of_up), threads)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, contiguous and of one shape."""
    out = torch.empty_like(gate)
    _swiglu(*(_flat(one, gate.shape[-1]) for one in (gate, up, out)), torch.get_num_threads())
    return out


def swiglu_back(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by gate and up."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    arrays = (_flat(one, gate.shape[-1]) for one in (gate, up, grad.to(gate.dtype), of_gate, of_up))
    _swiglu_back(*arrays, torch.get_num_threads())
    return of_gate, of_up


# Rotations.


@shared
def _rotate_rows(
    number: int, of: int, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, back: bool, out: np.ndarray
) -> None:
    rows, width = cos.shape
    half, heads = width // 2, x.shape[1] // width
    for row in range(rows * number // of, rows * (number + 1) // of):
        c1, c2, s1, s2 = cos[row, :half], cos[row, half:], sin[row, :half], sin[row, half:]
        for head in range(heads):
            a, b = x[row, head * width :][:half], x[row, head * width + half :][:half]
            first, second = out[row, head * width :][:half], out[row, head * width + half :][:half]
            if back:
                for i in range(half):
                    one, other = wide(a[i]), wide(b[i])
                    put(first, i, one * c1[i] + other * s2[i])
                    put(second, i, other * c2[i] - one * s1[i])
            else:
                for i in range(half):
                    one, other = wide(a[i]), wide(b[i])
                    put(first, i, one * c1[i] - other * s1[i])
                    put(second, i, other * c2[i] + one * s2[i])


@kernel(f"{F32}, {F32}, {F32}, boolean, {F32}, int32", f"{BF16}, {F32}, {F32}, boolean, {BF16}, int32")
def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, back: bool, out: np.ndarray, threads: int) -> None:
    _rotate_rows((x, cos, sin, back, out), threads)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, *, back: bool = False) -> Tensor:
    """x [1, H, T, D] turned by the angles of cos and sin [1, T, D]; `back`: the gradient by x of what was turned. The
    result lies in memory as [T, H, D]."""
    _, heads, tokens, width = x.shape
    out = torch.empty((1, tokens, heads, width), dtype=dtype)
    angles = (_flat(one.float(), width) for one in (cos, sin))
    source = _flat(x.transpose(1, 2).to(dtype), heads * width)
    _rotate(source, *angles, back, _flat(out, heads * width), torch.get_num_threads())
    return out.transpose(1, 2)


# Norms and the residual stream.


@shared
def _norm_rows(
    number: int,
    of: int,
    stream: np.ndarray,
    branch: np.ndarray,
    weight: np.ndarray,
    epsilon: float,
    total: np.ndarray,
    out: np.ndarray,
    rstd: np.ndarray,
) -> None:
    rows, width = stream.shape
    for row in range(rows * number // of, rows * (number + 1) // of):
        x, found, squares = stream[row], out[row], np.float32(0)
        if len(branch):
            added, sums = branch[row], total[row]
            for i in range(width):
                sums[i] = x[i] + wide(added[i])
            x = sums
        for i in range(width):
            squares += x[i] * x[i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(width) + np.float32(epsilon))
        rstd[row] = scale
        for i in range(width):
            put(found, i, x[i] * scale * weight[i])


@shared
def _norm_rows_back(
    number: int,
    of: int,
    total: np.ndarray,
    weight: np.ndarray,
    rstd: np.ndarray,
    grad_total: np.ndarray,
    grad_out: np.ndarray,
    of_stream: np.ndarray,
    of_branch: np.ndarray,
    of_weight: np.ndarray,
) -> None:
    rows, width = total.shape
    for row in range(rows * number // of, rows * (number + 1) // of):
        x, d, rest, found, scale = total[row], grad_out[row], grad_total[row], of_stream[row], rstd[row]
        along = np.float32(0)
        for i in range(width):
            along += wide(d[i]) * weight[i] * x[i]
        if len(of_weight):
            sums = of_weight[number]
            for i in range(width):
                sums[i] += wide(d[i]) * x[i] * scale
        along *= scale * scale / np.float32(width)
        for i in range(width):
            found[i] = rest[i] + scale * (wide(d[i]) * weight[i] - x[i] * along)
        if len(of_branch):
            rounded = of_branch[row]
            for i in range(width):
                put(rounded, i, found[i])


def _norm_signature(kind: str) -> str:
    return f"{F32}, {kind}, float32[::1], float64, {F32}, {kind}, float32[::1], int32"


@kernel(_norm_signature(F32), _norm_signature(BF16))
def _add_norm(
    stream: np.ndarray,
    branch: np.ndarray,
    weight: np.ndarray,
    epsilon: float,
    total: np.ndarray,
    out: np.ndarray,
    rstd: np.ndarray,
    threads: int,
) -> None:
    _norm_rows((stream, branch, weight, epsilon, total, out, rstd), threads)


def _norm_back_signature(kind: str) -> str:
    return f"{F32}, float32[::1], float32[::1], {F32}, {kind}, {F32}, {kind}, {F32}, int32"


@kernel(_norm_back_signature(F32), _norm_back_signature(BF16))
def _add_norm_back(
    total: np.ndarray,
    weight: np.ndarray,
    rstd: np.ndarray,
    grad_total: np.ndarray,
    grad_out: np.ndarray,
    of_stream: np.ndarray,
    of_branch: np.ndarray,
    of_weight: np.ndarray,
    threads: int,
) -> None:
    _norm_rows_back((total, weight, rstd, grad_total, grad_out, of_stream, of_branch, of_weight), threads)


def add_norm(
    stream: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of fp32 rows [..., D] and what is added to them: (sum fp32, x / rms(x) * weight in a dtype, 1 / rms [T])."""
    width = stream.shape[-1]
    if branch is not None and branch.dtype != dtype:  # a kernel has one format; nothing is rounded for its sake
        stream, branch = stream + branch, None
    total = stream if branch is None else torch.empty_like(stream)
    out = torch.empty(stream.shape, dtype=dtype)
    rstd = torch.empty(stream.numel() // width)
    added = torch.empty((0, width), dtype=dtype) if branch is None else branch
    arrays = _flat(stream, width), _flat(added, width), _own(weight)
    results = _flat(total, width), _flat(out, width), rstd.numpy()
    _add_norm(*arrays, epsilon, *results, torch.get_num_threads())
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
    width, threads, dtype = total.shape[-1], torch.get_num_threads(), grad_out.dtype
    stream = torch.empty_like(total)
    of_branch = torch.empty(total.shape if branch == dtype else (0, width), dtype=dtype)
    parts = torch.zeros((threads if of_weight else 0, width))
    given = (_flat(one, width) for one in (grad_total, grad_out))
    results = (_flat(one, width) for one in (stream, of_branch, parts))
    _add_norm_back(_flat(total, width), _own(weight), rstd.numpy(), *given, *results, threads)
    if branch is not None and branch != dtype:
        of_branch = stream.to(branch)
    return stream, None if branch is None else of_branch, parts.sum(0) if of_weight else None


# What attention over packed rows gathers and scatters.


@shared
def _gather_places(number: int, of: int, x: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    blocks, heads, length, width = out.shape
    for place in range(blocks * length * number // of, blocks * length * (number + 1) // of):
        row, block, token = table[place], place // length, place % length
        for head in range(heads):
            found = out[block, head, token]
            if row < 0:
                found[:] = 0
            else:
                found[:] = x[row, head * width : (head + 1) * width]


@shared
def _scatter_places(number: int, of: int, x: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    blocks, kv_heads, folded, width = x.shape
    length = len(table) // blocks
    fold = folded // length
    for place in range(len(table) * number // of, len(table) * (number + 1) // of):
        row, block, token = table[place], place // length, place % length
        if row >= 0:
            for head in range(kv_heads * fold):
                value = x[block, head // fold, head % fold * length + token]
                found = out[row, head * width : (head + 1) * width]
                for i in range(width):
                    put(found, i, wide(value[i]))


@shared
def _add_places(
    number: int, of: int, x: np.ndarray, table: np.ndarray, first: np.ndarray, last: np.ndarray, out: np.ndarray
) -> None:
    _, heads, length, width = x.shape
    for place in range(len(table) * number // of, len(table) * (number + 1) // of):
        row, group, token = table[place], place // length, place % length
        if row >= 0:
            for block in range(first[group], last[group]):
                for head in range(heads):
                    value, found = x[block, head, token], out[row, head * width : (head + 1) * width]
                    for i in range(width):
                        found[i] += wide(value[i])


_BLOCKS = {F32: "float32[:, :, :, ::1]", BF16: "uint16[:, :, :, ::1]"}


@kernel(*(f"{kind}, {_IDS}, {_BLOCKS[kind]}, int32" for kind in _BLOCKS))
def _gather(x: np.ndarray, table: np.ndarray, out: np.ndarray, threads: int) -> None:
    _gather_places((x, table, out), threads)


@kernel(*(f"{_BLOCKS[kind]}, {_IDS}, {out}, int32" for kind, out in ((F32, F32), (BF16, BF16), (BF16, F32))))
def _scatter(x: np.ndarray, table: np.ndarray, out: np.ndarray, threads: int) -> None:
    _scatter_places((x, table, out), threads)


@kernel(*(f"{_BLOCKS[kind]}, {_IDS}, {_IDS}, {_IDS}, {F32}, int32" for kind in _BLOCKS))
def _add(x: np.ndarray, table: np.ndarray, first: np.ndarray, last: np.ndarray, out: np.ndarray, threads: int) -> None:
    _add_places((x, table, first, last, out), threads)


def _ids(table: Tensor) -> np.ndarray:
    return table.reshape(-1).numpy()


def _blocks(x: Tensor) -> np.ndarray:
    return array_of(x.detach().contiguous())


def gather_rows(x: Tensor, table: Tensor) -> Tensor:
    """Rows of x [T, H, D] by a table int64 [B, L]: [B, H, L, D], 0 where it has -1."""
    (blocks, length), (_, heads, width) = table.shape, x.shape
    out = torch.empty((blocks, heads, length, width), dtype=x.dtype)
    _gather(_flat(x, heads * width), _ids(table), array_of(out), torch.get_num_threads())
    return out


def scatter_rows_(out: Tensor, x: Tensor, table: Tensor) -> None:
    """Writes x [B, KV, H / KV * L, D] into the rows of a contiguous [T, H, D]; what has -1 in the table is left out."""
    _scatter(_blocks(x), _ids(table), _flat(out, out.shape[1] * out.shape[2]), torch.get_num_threads())


def add_blocks_(out: Tensor, x: Tensor, table: Tensor, first: Tensor, last: Tensor) -> None:
    """Adds to the rows of a contiguous fp32 [T, H, D] those of x [B, H, L, D] from block `first` to before `last`.

    `table` int64 [G, L]: the row for each group and place, -1: none; `first` and `last` int64 [G].
    """
    width = out.shape[1] * out.shape[2]
    _add(_blocks(x), _ids(table), _ids(first), _ids(last), _flat(out, width), torch.get_num_threads())
