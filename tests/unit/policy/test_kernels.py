"""The kernels for a few rows against the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numeric import assert_same

from services.policy.engines import kernels


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm() -> None:
    x, weight, out = random(3, 40), random(40, seed=1), np.empty((3, 40), np.float32)
    kernels.rms_norm(x, weight, 1e-5, out)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight
    assert_same(out, expected)


def test_silu_multiply_by_hand() -> None:
    out = np.empty((1, 3), np.float32)
    kernels.silu_multiply(np.array([[0.0, 1.0, -200.0, 5.0, 2.0, 3.0]], np.float32), out)
    assert_same(out, [[0.0, 2 / (1 + np.exp(-1)), 0.0]])


@pytest.mark.parametrize("window", [0, 4])
def test_attend(window: int) -> None:
    heads, kv_heads, dim, capacity, half = 6, 2, 8, 16, 4
    positions = np.array([0, 9, 15])
    mixed = random(3, (heads + 2 * kv_heads) * dim)
    angles = random(3, half, seed=1)
    cos, sin = np.tile(np.cos(angles), 2), np.concatenate((-np.sin(angles), np.sin(angles)), 1)
    keys, values = random(3, kv_heads, dim, capacity, seed=2), random(3, kv_heads, capacity, dim, seed=3)
    out = np.empty((3, heads * dim), np.float32)
    q, k, v = np.split(mixed.astype(np.float64).reshape(3, -1, dim), [heads, heads + kv_heads], 1)
    own_keys, own_values = keys.astype(np.float64), values.astype(np.float64)

    kernels.attend(mixed.copy(), cos, sin, positions, keys, values, 0.3, window, out)

    def rotated(x: np.ndarray) -> np.ndarray:
        swapped = np.concatenate((x[..., half:], x[..., :half]), -1)
        return x * cos[:, None] + swapped * sin[:, None]

    for row, here in enumerate(positions):
        own_keys[row, :, :, here], own_values[row, :, here] = rotated(k)[row], v[row]
        seen = slice(max(0, here + 1 - window) if window else 0, here + 1)
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = 0.3 * rotated(q)[row, head] @ own_keys[row, kv][:, seen]
            weights = np.exp(scores - scores.max())
            expected = weights / weights.sum() @ own_values[row, kv, seen]
            assert_same(out[row, head * dim : (head + 1) * dim], expected)
    assert_same(keys, own_keys)
    assert_same(values, own_values)


def test_where_nothing_can_be_written_they_are_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = kernels.njit

    def nowhere(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        def decorate(function: Callable[..., None]) -> Any:
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return njit(*arguments, **options)(function)

        return decorate

    monkeypatch.setattr(kernels, "njit", nowhere)

    def double(x: np.ndarray) -> None:
        x[:] *= 2

    row = np.ones((1, 2), np.float32)
    kernels._kernel("float32[:, ::1]")(double)(row)
    assert row.tolist() == [[2.0, 2.0]]
