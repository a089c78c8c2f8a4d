"""The CPU's decoding kernels against the same in float64, in both number formats and with more threads than work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numeric import assert_same

from services.policy.engines import kernels
from steersman.nn import compiled
from steersman.nn.hardware import array_of

EXACT, ROUNDED = 1e-5, 2.0**-8
"""Relative error of float32 sums, and of one rounding to bfloat16."""


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """As bfloat16."""
    return array_of(torch.from_numpy(values).bfloat16()).copy()


def widened(values: np.ndarray) -> np.ndarray:
    """float64 of either format."""
    if values.dtype == np.uint16:
        return torch.from_numpy(values).view(torch.bfloat16).double().numpy()
    return values.astype(np.float64)


FORMATS = [pytest.param(lambda x: x, EXACT, id="float32"), pytest.param(rounded, ROUNDED, id="bfloat16")]
THREADS = pytest.mark.parametrize("threads", [1, 2, 7])


@THREADS
@pytest.mark.parametrize(("form", "error"), FORMATS)
@pytest.mark.parametrize("added", [0, 3])
def test_rms_norm(form: Callable[[np.ndarray], np.ndarray], error: float, added: int, threads: int) -> None:
    x, weight, out = random(3, 40), random(40, seed=1), form(np.zeros((3, 40), np.float32))
    more = form(random(3, 40, seed=2))[:added]
    stream = x.astype(np.float64) + (widened(more) if added else 0)
    expected = stream / np.sqrt((stream**2).mean(1, keepdims=True) + 1e-5) * weight

    kernels.rms_norm(x, more, weight, 1e-5, out, threads)

    assert_same(x, stream)
    np.testing.assert_allclose(widened(out), expected, rtol=error)


def test_silu_multiply_by_hand() -> None:
    out = np.empty((1, 3), np.float32)
    kernels.silu_multiply(np.array([[0.0, 1.0, -1e30, 5.0, 2.0, 3.0]], np.float32), out)
    assert_same(out, [[0.0, 2 / (1 + np.exp(-1)), 0.0]])


@THREADS
@pytest.mark.parametrize("window", [0, 1, 4, 7])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("form", "cached", "error"),
    [
        pytest.param(lambda x: x, lambda x: x, EXACT, id="float32"),
        pytest.param(lambda x: x, rounded, ROUNDED, id="bfloat16-cache"),
        pytest.param(rounded, rounded, ROUNDED, id="bfloat16"),
    ],
)
def test_attend(
    form: Callable[[np.ndarray], np.ndarray],
    cached: Callable[[np.ndarray], np.ndarray],
    error: float,
    normed: bool,
    window: int,
    threads: int,
) -> None:
    heads, kv_heads, dim, capacity, half = 6, 2, 8, 16, 4
    positions = np.array([0, 9, 15])
    mixed = form(random(3, (heads + 2 * kv_heads) * dim))
    angles = random(3, half, seed=1)
    cos, sin = np.tile(np.cos(angles), 2), np.concatenate((-np.sin(angles), np.sin(angles)), 1)
    keys, values = (
        cached(random(3, kv_heads, capacity, dim, seed=2)),
        cached(random(3, kv_heads, capacity, dim, seed=3)),
    )
    transposed = keys.dtype == np.float32
    norms = (random(dim, seed=4), random(dim, seed=5)) if normed else (np.empty(0, np.float32), np.empty(0, np.float32))
    own_keys, own_values = widened(keys), widened(values)
    if transposed:
        keys = np.ascontiguousarray(keys.transpose(0, 1, 3, 2))
    out = form(np.zeros((3, heads * dim), np.float32))
    q, k, v = np.split(widened(mixed).reshape(3, -1, dim), [heads, heads + kv_heads], 1)

    kernels.attend(mixed, cos, sin, positions, keys, values, norms, 1e-5, 0.3, window, out, threads)

    def rotated(x: np.ndarray, norm: np.ndarray) -> np.ndarray:
        if normed:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm
        swapped = np.concatenate((x[..., half:], x[..., :half]), -1)
        return x * cos[:, None] + swapped * sin[:, None]

    stored = keys.transpose(0, 1, 3, 2) if transposed else keys
    for row, here in enumerate(positions):
        own_keys[row, :, here], own_values[row, :, here] = rotated(k, norms[1])[row], v[row]
        np.testing.assert_allclose(widened(stored)[row, :, here], own_keys[row, :, here], rtol=error, atol=error)
        np.testing.assert_allclose(widened(values)[row, :, here], own_values[row, :, here], rtol=error)
        own_keys[row, :, here], own_values[row, :, here] = widened(stored)[row, :, here], widened(values)[row, :, here]
        seen = slice(max(0, here + 1 - window) if window else 0, here + 1)
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = 0.3 * rotated(q, norms[0])[row, head] @ own_keys[row, kv, seen].T
            weights = np.exp(scores - scores.max())
            expected = weights / weights.sum() @ own_values[row, kv, seen]
            found = widened(out)[row, head * dim : (head + 1) * dim]
            np.testing.assert_allclose(found, expected, rtol=error, atol=1e-6 if transposed else 1e-3)
    assert_same(widened(stored), own_keys)
    assert_same(widened(values), own_values)


@THREADS
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_multiply(rows: int, add: bool, biased: bool, threads: int) -> None:
    weight, x, out = rounded(random(5, 40)), random(rows, 40, seed=1), random(rows, 5, seed=2)
    bias = random(5 if biased else 0, seed=3)
    expected = x @ widened(weight).T + (bias if biased else 0) + (out.astype(np.float64) if add else 0)

    kernels.multiply(weight, bias, x, out, add, threads)

    assert_same(out, expected)


@THREADS
def test_merge(threads: int) -> None:
    base, b, a = rounded(random(5, 40)), random(5, 8, seed=1), random(8, 40, seed=2)
    out = np.zeros_like(base)

    kernels.merge(base, b, a, out, threads)

    np.testing.assert_allclose(widened(out), widened(base) + b.astype(np.float64) @ a, rtol=ROUNDED, atol=1e-5)


@THREADS
@pytest.mark.parametrize(("form", "error"), FORMATS)
def test_block_sums(form: Callable[[np.ndarray], np.ndarray], error: float, threads: int) -> None:
    scores = form(30 * random(3, 50))
    if scores.dtype == np.float32:
        scores[1, ::2] = -np.inf
    highest, sums = np.empty(3, np.float32), np.empty((3, 4), np.float32)

    kernels.block_sums(scores, highest, sums, 16, threads)

    own = widened(scores)
    weights = np.exp(own - own.max(1, keepdims=True))
    assert highest.tolist() == own.max(1).tolist()
    assert_same(sums, np.add.reduceat(weights, [0, 16, 32, 48], 1))


def test_exponential() -> None:
    x = np.linspace(-87, 0, 100_001, dtype=np.float32)[:, None]
    highest, sums = np.empty(len(x), np.float32), np.empty((len(x), 2), np.float32)

    kernels.block_sums(np.concatenate((np.zeros_like(x), x), 1), highest, sums, 1, 1)

    np.testing.assert_allclose(sums[:, 1], np.exp(x[:, 0].astype(np.float64)), rtol=3e-7)


@pytest.mark.parametrize("place", [0, 7, 49])
def test_what_is_not_a_number_stays_visible(place: int) -> None:
    scores = random(2, 50)
    scores[0, place] = np.nan
    highest, sums = np.empty(2, np.float32), np.empty((2, 4), np.float32)

    kernels.block_sums(scores, highest, sums, 16, 1)

    assert np.isnan(sums[0].sum())
    assert np.isfinite(sums[1]).all()

    values = random(1, 1, 4, 8)
    values[0, 0, 1, place % 8] = np.nan
    keys, out, none = random(1, 1, 8, 4), np.zeros((1, 8), np.float32), np.empty(0, np.float32)
    turn = np.ones((1, 8), np.float32)
    kernels.attend(random(1, 24), turn, turn, np.array([2]), keys, values, (none, none), 0.0, 1.0, 0, out, 1)
    assert np.isnan(out[0, place % 8])


@pytest.mark.parametrize("value", [1.0, -2.5, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, 1e-40, float("inf")])
def test_bfloat16_is_rounded_as_torch_does(value: float) -> None:
    out = np.zeros((1, 1), np.uint16)
    kernels.rms_norm(
        np.array([[1.0]], np.float32), np.empty((0, 1), np.uint16), np.array([value], np.float32), 0.0, out, 1
    )
    assert out[0, 0] == rounded(np.array([value], np.float32))[0]


def test_where_nothing_can_be_written_they_are_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = compiled.njit

    def nowhere(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        def decorate(function: Callable[..., None]) -> Any:
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return njit(*arguments, **options)(function)

        return decorate

    monkeypatch.setattr(compiled, "inlined", nowhere)

    def double(x: np.ndarray) -> None:
        x[:] *= 2

    row = np.ones((1, 2), np.float32)
    compiled.kernel("float32[:, ::1]")(double)(row)
    assert row.tolist() == [[2.0, 2.0]]
