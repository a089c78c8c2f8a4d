"""Decoding on a CPU: what lies between two products of a layer, as one call each, the product of a few rows, and the
sums that a token is drawn with.

A dozen small tensor operations between two products take as long as the products, because each finds cold caches;
torch's attention over a cache works in blocks of queries, and a decoding step has one a row. Activations and caches are
float32 or bfloat16; everything is computed in float32. Float32 caches hold their keys transposed
(`kv_cache.LayerCache`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from steersman.nn.compiled import BF16, F32, exp, inlined, kernel, largest, put, shared, wide


@shared
def _norm_rows(
    number: int, of: int, x: np.ndarray, more: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray
) -> None:
    rows, size = x.shape
    for row in range(rows * number // of, rows * (number + 1) // of):
        stream, found = x[row], out[row]
        if len(more):
            added = more[row]
            for i in range(size):
                stream[i] += wide(added[i])
        total = np.float32(0)
        for i in range(size):
            total += stream[i] * stream[i]
        factor = np.float32(1) / np.sqrt(total / np.float32(size) + np.float32(eps))
        for i in range(size):
            put(found, i, stream[i] * factor * weight[i])


@kernel(f"{F32}, {F32}, float32[::1], float64, {F32}, int32", f"{F32}, {BF16}, float32[::1], float64, {BF16}, int32")
def rms_norm(x: np.ndarray, more: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, threads: int) -> None:
    """x += more, and out = x / sqrt(mean(x^2) + eps) * weight of every row; [B, n], [B or 0, n], [n], [B, n]."""
    _norm_rows((x, more, weight, eps, out), threads)


@inlined()
def _widen(source: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        out[i] = wide(source[i])


def _score(query: Any, keys: Any, start: Any, here: Any, lines: Any, scores: Any) -> None:
    """scores [group, 0 on] = query [group, dim] k of a head's cached keys from token `start` to at least `here`."""
    raise NotImplementedError


@overload(_score, jit_options={"fastmath": inlined.keywords["fastmath"]})
def _score_of(query: Any, keys: Any, start: Any, here: Any, lines: Any, scores: Any) -> Any:
    # Slices of one dimension and loops from 0 are what the compiler turns into vector instructions.
    if keys.dtype == types.float32:

        def score(query: Any, keys: Any, start: Any, here: Any, lines: Any, scores: Any) -> None:
            tokens = here + 1 - start
            for head in range(len(query)):
                seen = scores[head]
                seen[:tokens] = 0
                for i in range(len(keys)):
                    factor, key = query[head, i], keys[i, start : here + 1]
                    for token in range(tokens):
                        seen[token] += factor * key[token]

    else:

        def score(query: Any, keys: Any, start: Any, here: Any, lines: Any, scores: Any) -> None:
            dim, flat = keys.shape[1], keys.reshape(-1)
            a, b, c, d = lines[:dim], lines[dim : 2 * dim], lines[2 * dim : 3 * dim], lines[3 * dim :]
            for token in range(start, here + 1, 4):
                _widen(flat[token * dim : (token + 4) * dim], lines)
                for head in range(len(query)):
                    one = query[head]
                    of_a = of_b = of_c = of_d = np.float32(0)
                    for i in range(dim):
                        of_a += one[i] * a[i]
                        of_b += one[i] * b[i]
                        of_c += one[i] * c[i]
                        of_d += one[i] * d[i]
                    seen = scores[head, token - start : token - start + 4]
                    seen[0], seen[1], seen[2], seen[3] = of_a, of_b, of_c, of_d

    return score


@inlined()
def _rotate(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, norm: np.ndarray, eps: float, scale: float, out: np.ndarray
) -> None:
    """out [dim] = scale x [dim], normed where `norm` [dim or 0] has weights, rotated."""
    dim = len(x)
    for i in range(dim):
        out[i] = wide(x[i]) * np.float32(scale)
    if len(norm):
        total = np.float32(0)
        for i in range(dim):
            total += wide(x[i]) * wide(x[i])
        factor = np.float32(1) / np.sqrt(total / np.float32(dim) + np.float32(eps))
        for i in range(dim):
            out[i] *= factor * norm[i]
    half = dim // 2
    low, high = out[:half], out[half:]
    low_cos, high_cos, low_sin, high_sin = cos[:half], cos[half:], sin[:half], sin[half:]
    for i in range(half):
        one, other = low[i], high[i]
        low[i] = one * low_cos[i] + other * low_sin[i]
        high[i] = other * high_cos[i] + one * high_sin[i]


@inlined()
def _score_width(positions: np.ndarray) -> int:
    """Scores of a row, in whole cache lines."""
    return (positions.max() // 16 + 1) * 16


@shared
def _attend_heads(
    number: int,
    of: int,
    mixed: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    norms: tuple[np.ndarray, np.ndarray],
    eps: float,
    scale: float,
    window: int,
    out: np.ndarray,
    memory: np.ndarray,
) -> None:
    rows, kv_heads, dim = len(positions), keys.shape[1], cos.shape[1]
    heads = out.shape[1] // dim
    group = heads // kv_heads
    own, size, width = memory[number], group * dim, _score_width(positions)
    query, found = own[:size].reshape(group, dim), own[size : 2 * size].reshape(group, dim)
    lines, own = own[2 * size : 2 * size + 4 * dim], own[2 * size + 4 * dim :]
    a, b, c, d = lines[:dim], lines[dim : 2 * dim], lines[2 * dim : 3 * dim], lines[3 * dim :]
    scores, totals = own[: group * width].reshape(group, width), own[group * width :]
    for unit in range(rows * kv_heads * number // of, rows * kv_heads * (number + 1) // of):
        row, kv = unit // kv_heads, unit % kv_heads
        here = positions[row]
        first = max(0, here + 1 - window) if window else 0
        start = first // 4 * 4  # whole fours of tokens are read; those that are not seen weigh nothing
        unseen, tokens = first - start, here + 1 - start
        parts = mixed[row].reshape(-1, dim)
        for head in range(group):
            _rotate(parts[kv * group + head], cos[row], sin[row], norms[0], eps, scale, query[head])
        _rotate(parts[heads + kv], cos[row], sin[row], norms[1], eps, 1.0, a)
        _store_key(keys[row, kv], here, a)
        new, place = parts[heads + kv_heads + kv], values[row, kv, here]
        for i in range(dim):
            put(place, i, wide(new[i]))
        _score(query, keys[row, kv], start, here, lines, scores)
        for head in range(group):
            seen = scores[head, unseen:tokens]
            top, total = largest(seen), np.float32(0)
            for token in range(len(seen)):
                seen[token] = exp(seen[token] - top)
                total += seen[token]
            totals[head] = total
            scores[head, :unseen] = 0
            scores[head, tokens : (tokens + 3) // 4 * 4] = 0
        found[:] = 0
        flat = values[row, kv].reshape(-1)
        for token in range(0, tokens, 4):
            _widen(flat[(start + token) * dim : (start + token + 4) * dim], lines)
            for head in range(group):
                sums, seen = found[head], scores[head, token : token + 4]
                of_a, of_b, of_c, of_d = seen[0], seen[1], seen[2], seen[3]
                for i in range(dim):
                    sums[i] += of_a * a[i] + of_b * b[i] + of_c * c[i] + of_d * d[i]
        for head in range(group):
            result = out[row, (kv * group + head) * dim : (kv * group + head + 1) * dim]
            for i in range(dim):
                put(result, i, found[head, i] / totals[head])


def _store_key(keys: Any, here: Any, key: Any) -> None:
    """Puts a key float32 [dim] into the cached keys of a head."""
    raise NotImplementedError


@overload(_store_key)
def _store_key_of(keys: Any, here: Any, key: Any) -> Any:
    if keys.dtype == types.float32:

        def store(keys: Any, here: Any, key: Any) -> None:
            for i in range(len(key)):
                keys[i, here] = key[i]
    else:

        def store(keys: Any, here: Any, key: Any) -> None:
            place = keys[here]
            for i in range(len(key)):
                put(place, i, key[i])

    return store


def _attend_signature(mixed: str, cache: str) -> str:
    stored = f"{cache}[:, :, :, ::1]"
    norms = "UniTuple(float32[::1], 2), float64"
    return f"{mixed}, {F32}, {F32}, int64[::1], {stored}, {stored}, {norms}, float64, int64, {mixed}, int32"


@kernel(_attend_signature(F32, "float32"), _attend_signature(F32, "uint16"), _attend_signature(BF16, "uint16"))
def attend(
    mixed: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    norms: tuple[np.ndarray, np.ndarray],
    eps: float,
    scale: float,
    window: int,
    out: np.ndarray,
    threads: int,
) -> None:
    """Rotates queries and keys, stores keys and values, and attends; one new token a row.

    Args:
        mixed: [B, (heads + 2 kv heads) dim], queries, keys and values.
        cos, sin: float32 [B, dim], the sine with the sign that its half has.
        positions: int64 [B]
        keys: the cache; float32 [rows, kv heads, dim, capacity] or bfloat16 [rows, kv heads, capacity, dim].
        values: the cache, [rows, kv heads, capacity, dim]; the capacity is a multiple of 4, and all of it finite.
        norms: weights of a norm over the dim numbers of each query and of each key, [dim] each or [0]; eps: theirs.
        window: how many tokens are seen, the new one included; 0: all.
        out: [B, heads dim]
    """
    dim = cos.shape[1]
    group = out.shape[1] // dim // keys.shape[1]
    # A multiple of a cache line, and one more, so that no thread waits for what its neighbour writes.
    size = (2 * group + 4) * dim + group * _score_width(positions) + group
    memory = np.empty((threads, -(-size // 16) * 16 + 16), np.float32)
    _attend_heads((mixed, cos, sin, positions, keys, values, norms, eps, scale, window, out, memory), threads)


@kernel(f"{F32}, {F32}")
def silu_multiply(gate_up: np.ndarray, out: np.ndarray) -> None:
    """silu(gate) * up; [B, 2 n], gate before up, and [B, n]."""
    size = out.shape[1]
    for row in range(out.shape[0]):
        gate, up, found = gate_up[row, :size], gate_up[row, size:], out[row]
        for i in range(size):
            found[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i]


@shared
def _multiply_lines(
    number: int,
    of: int,
    weight: np.ndarray,
    bias: np.ndarray,
    x: np.ndarray,
    out: np.ndarray,
    add: bool,
    memory: np.ndarray,
) -> None:
    lines, wide_line = len(weight), memory[number]
    size = len(wide_line)
    for place in range(lines * number // of, lines * (number + 1) // of):
        line, start = weight[place], bias[place] if len(bias) else np.float32(0)
        if len(x) > 1:
            for i in range(size):
                wide_line[i] = wide(line[i])
        for row in range(len(x)):
            total, factors = np.float32(0), x[row]
            if len(x) > 1:
                for i in range(size):
                    total += wide_line[i] * factors[i]
            else:
                for i in range(size):
                    total += wide(line[i]) * factors[i]
            out[row, place] = total + start + out[row, place] if add else total + start


@kernel(f"{BF16}, float32[::1], {F32}, float32[:, :], boolean, int32")
def multiply(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, out: np.ndarray, add: bool, threads: int) -> None:
    """out = W x + b of a few rows with bfloat16 weights, or out += that; [out, in], [out or 0], [B, in], [B, out].

    It reads the weights once, as fast as memory gives them; oneDNN's product of one row reaches half of that.
    """
    memory = np.empty((threads, weight.shape[1]), np.float32)
    _multiply_lines((weight, bias, x, out, add, memory), threads)


@shared
def _merge_lines(
    number: int, of: int, base: np.ndarray, b: np.ndarray, a: np.ndarray, out: np.ndarray, memory: np.ndarray
) -> None:
    lines, sums = len(base), memory[number]
    for place in range(lines * number // of, lines * (number + 1) // of):
        old, new, factors = base[place], out[place], b[place]
        for i in range(len(sums)):
            sums[i] = wide(old[i])
        for rank in range(0, len(a), 4):
            one, two, three, four = a[rank], a[rank + 1], a[rank + 2], a[rank + 3]
            of_one, of_two, of_three, of_four = (
                factors[rank], factors[rank + 1], factors[rank + 2], factors[rank + 3],
            )  # fmt: skip
            for i in range(len(sums)):
                sums[i] += of_one * one[i] + of_two * two[i] + of_three * three[i] + of_four * four[i]
        for i in range(len(sums)):
            put(new, i, sums[i])


@kernel(f"{BF16}, {F32}, {F32}, {BF16}, int32")
def merge(base: np.ndarray, b: np.ndarray, a: np.ndarray, out: np.ndarray, threads: int) -> None:
    """out = base + b a, rounded once; [out, in], [out, r], [r, in], [out, in] with r a multiple of 4."""
    memory = np.empty((threads, base.shape[1]), np.float32)
    _merge_lines((base, b, a, out, memory), threads)


@shared
def _sum_blocks(number: int, of: int, scores: np.ndarray, highest: np.ndarray, sums: np.ndarray, block: int) -> None:
    rows = len(scores)
    for row in range(rows * number // of, rows * (number + 1) // of):
        line = scores[row]
        top = largest(line)
        highest[row] = top
        for place in range(sums.shape[1]):
            part, total = line[place * block : (place + 1) * block], np.float32(0)
            for i in range(len(part)):
                total += exp(wide(part[i]) - top)
            sums[row, place] = total


def _sums_signature(scores: str) -> str:
    return f"{scores}, float32[::1], {F32}, int64, int32"


@kernel(_sums_signature(F32), _sums_signature(BF16))
def block_sums(scores: np.ndarray, highest: np.ndarray, sums: np.ndarray, block: int, threads: int) -> None:
    """The largest of each row, and the sums of e^(x - largest) over blocks of its columns.

    [B, V] with a finite number in each row, [B], [B, ceil(V / block)].
    """
    _sum_blocks((scores, highest, sums, block), threads)
