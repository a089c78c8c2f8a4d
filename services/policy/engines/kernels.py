"""Decoding a few rows on a CPU: what lies between two products of a layer, as one call each.

With a few rows a product takes as long as reading its weights, and a dozen small tensor operations between two of them
take as long again, because each finds cold caches. Numba compiles these functions when the module is imported, and
keeps the result where it may write. Every row is computed on the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import njit

_ROWS = "float32[:, ::1]"


def _kernel(*arguments: str) -> Callable[[Callable[..., None]], Any]:
    compiled = partial(njit, f"void({', '.join(arguments)})", nogil=True, fastmath=True, error_model="numpy")

    def decorate(function: Callable[..., None]) -> Any:
        try:
            return compiled(cache=True)(function)
        except RuntimeError:  # neither this folder nor the user's cache can be written to
            return compiled()(function)

    return decorate


@_kernel(_ROWS, "float32[::1]", "float64", _ROWS)
def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """x / sqrt(mean(x^2) + eps) * weight of every row; [B, n], [n], [B, n]."""
    size = x.shape[1]
    for row in range(x.shape[0]):
        total = np.float32(0)
        for i in range(size):
            total += x[row, i] * x[row, i]
        factor = np.float32(1) / np.sqrt(total / np.float32(size) + np.float32(eps))
        for i in range(size):
            out[row, i] = x[row, i] * factor * weight[i]


@_kernel(
    _ROWS,
    _ROWS,
    _ROWS,
    "int64[::1]",
    "float32[:, :, :, ::1]",
    "float32[:, :, :, ::1]",
    "float64",
    "int64",
    _ROWS,
)
def attend(
    mixed: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scale: float,
    window: int,
    out: np.ndarray,
) -> None:
    """Rotates queries and keys, stores keys and values, and attends; one new token a row.

    Args:
        mixed: [B, (heads + 2 kv heads) dim], queries, keys and values; changed in place.
        cos, sin: [B, dim], the sine with the sign that its half has.
        positions: int64 [B]
        keys: the cache, transposed [rows, kv heads, dim, capacity].
        values: the cache, [rows, kv heads, capacity, dim].
        window: how many tokens are seen, the new one included; 0: all.
        out: [B, heads dim]
    """
    kv_heads, dim = keys.shape[1], keys.shape[2]
    heads, half = out.shape[1] // dim, dim // 2
    group = heads // kv_heads
    scores = np.empty(positions.max() + 1, np.float32)
    # Slices of one dimension and loops from 0 are what the compiler turns into vector instructions.
    for row in range(len(positions)):
        here = positions[row]
        first = max(0, here + 1 - window) if window else 0
        seen = scores[: here + 1 - first]
        parts = mixed[row].reshape(-1, dim)
        low_cos, high_cos, low_sin, high_sin = cos[row, :half], cos[row, half:], sin[row, :half], sin[row, half:]
        for head in range(heads + kv_heads):
            low, high = parts[head, :half], parts[head, half:]
            for i in range(half):
                one, other = low[i], high[i]
                low[i] = one * low_cos[i] + other * low_sin[i]
                high[i] = other * high_cos[i] + one * high_sin[i]
        for kv in range(kv_heads):
            for i in range(dim):
                keys[row, kv, i, here] = parts[heads + kv, i]
                values[row, kv, here, i] = parts[heads + kv_heads + kv, i]
        for head in range(heads):
            kv, query, found = head // group, parts[head], out[row, head * dim : (head + 1) * dim]
            seen[:] = 0
            for i in range(dim):
                factor, key = query[i] * np.float32(scale), keys[row, kv, i, first : here + 1]
                for token in range(len(seen)):
                    seen[token] += factor * key[token]
            highest = seen.max()
            total = np.float32(0)
            for token in range(len(seen)):
                seen[token] = np.exp(seen[token] - highest)
                total += seen[token]
            found[:] = 0
            for token in range(len(seen)):
                share, value = seen[token] / total, values[row, kv, first + token]
                for i in range(dim):
                    found[i] += share * value[i]


@_kernel(_ROWS, _ROWS)
def silu_multiply(gate_up: np.ndarray, out: np.ndarray) -> None:
    """silu(gate) * up; [B, 2 n], gate before up, and [B, n]."""
    size = out.shape[1]
    for row in range(out.shape[0]):
        gate, up, found = gate_up[row, :size], gate_up[row, size:], out[row]
        for i in range(size):
            found[i] = gate[i] / (np.float32(1) + np.exp(-gate[i])) * up[i]
