"""Decoding on a CPU: what lies between two products of a layer, as one call each, the product of a few rows, and the
sums that a token is drawn with.

A dozen small tensor operations between two products take as long as the products, because each finds cold caches;
torch's attention over a cache works in blocks of queries, and a decoding step has one a row. Activations and caches are
float32 or bfloat16 (as uint16, see `hardware.array_of`); everything is computed in float32. Float32 caches hold their
keys transposed (`kv_cache.LayerCache`).

Numba compiles the functions when the module is imported. Its own threads would be a second pool beside torch's, and two
that spin on the same cores slow each other many times over. So `_shared` asks the OpenMP runtime that torch has loaded,
by the call that GCC compiles `#pragma omp parallel` to; Intel's and LLVM's runtimes know it, too.

What compiles and what is compiled stand in one file because numba keeps results by the date of a function's file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch  # noqa: F401  its OpenMP runtime must be there
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.extending import overload

_POINTER, _INT = ir.IntType(8).as_pointer(), ir.IntType(32)
_intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic
_HAS_THREADS = hasattr(ctypes.CDLL(None), "GOMP_parallel")

_inlined = partial(njit, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz", "afn"}, error_model="numpy")
"""For what kernels call. Sums in any order, but what is not a number stays visible."""


def _kernel(*signatures: str) -> Callable[[Callable[..., None]], Any]:
    """A function that is compiled for these arguments when its module is imported; the result is kept where one may
    write.
    """
    compiled = partial(_inlined, [f"void({one})" for one in signatures])

    def decorate(function: Callable[..., None]) -> Any:
        try:
            return compiled(cache=True)(function)
        except RuntimeError:  # neither this folder nor the user's cache can be written to
            return compiled()(function)

    return decorate


@_intrinsic
def _float_of(typing: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@_intrinsic
def _bits_of(typing: Any, value: Any) -> Any:
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], _INT)


def _wide(value: Any) -> Any:
    """An element as float32: of float32 or of bfloat16 (uint16). Of compiled code only."""
    raise NotImplementedError


@overload(_wide, jit_options={"fastmath": _inlined.keywords["fastmath"]})
def _wide_of(value: Any) -> Any:
    if value == types.float32:

        def widen(value: Any) -> Any:
            return value
    else:

        def widen(value: Any) -> Any:
            return _float_of(np.uint32(value) << np.uint32(16))

    return widen


def _put(out: Any, i: int, value: Any) -> None:
    """out[i] = value, a float32, rounded to nearest even where `out` is bfloat16 (uint16). Of compiled code only."""
    raise NotImplementedError


@overload(_put, jit_options={"fastmath": _inlined.keywords["fastmath"]})
def _put_of(out: Any, i: Any, value: Any) -> Any:
    if out.dtype == types.float32:

        def store(out: Any, i: Any, value: Any) -> None:
            out[i] = value
    else:

        def store(out: Any, i: Any, value: Any) -> None:
            bits = _bits_of(value)
            out[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return store


@_inlined()
def _exp(x: Any) -> Any:
    """e^x of a float32 up to 88, within 3e-7 of itself, and 0 below -87. It calls nothing, so loops of it
    become vector instructions.
    """
    given = x
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - whole * np.float32(0.693147181)
    # Cephes' polynomial for |rest| <= ln 2 / 2.
    power = np.float32(1.9875691500e-4)
    power = power * rest + np.float32(1.3981999507e-3)
    power = power * rest + np.float32(8.3334519073e-3)
    power = power * rest + np.float32(4.1665795894e-2)
    power = power * rest + np.float32(1.6666665459e-1)
    power = power * rest + np.float32(5.0000001201e-1)
    power = power * rest * rest + rest + np.float32(1.0)
    power *= _float_of(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))
    return np.float32(0.0) if given < np.float32(-87.0) else power


@partial(njit, nogil=True, fastmath=True)
def _highest(line: np.ndarray) -> Any:
    """Of the numbers among them, a vector instruction at a time, which is compiled only where all may be numbers."""
    top = np.float32(-np.inf)
    for i in range(len(line)):
        top = max(top, _wide(line[i]))
    return top


def _shared(share: Callable[..., None]) -> Any:
    """Makes `f(arguments, threads)` of `share(number, of, *arguments)`, both for compiled code: calls it with the
    numbers 0 to `of` - 1, each on a thread of its own, and waits. The runtime may give fewer than `threads`. It raises
    nothing.
    """
    compiled = _inlined()(share)

    @_intrinsic
    def fork(typing: Any, arguments: Any, threads: Any) -> Any:
        call = (types.int64, types.int64, *arguments.types)
        typing.resolve_function_type(types.Dispatcher(compiled), call, {})

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _fork(context, builder, compiled.overloads[call], *args)
            return context.get_dummy_value()

        return types.void(arguments, types.int32), generate

    @_inlined()
    def run(arguments: Any, threads: int) -> None:
        borrowed = _borrow(arguments)
        if _HAS_THREADS and threads > 1:
            fork(borrowed, np.int32(threads))
        else:
            compiled(0, 1, *borrowed)

    return run


@_intrinsic
def _borrow(typing: Any, arguments: Any) -> Any:
    """The same tuple, its arrays without reference counts, for which threads would wait at every slice; the caller
    keeps them alive.
    """
    return arguments(arguments), lambda context, builder, signature, args: _borrowed(
        context, builder, arguments, args[0]
    )


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if hasattr(kind, "types"):
        parts = zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True)
        return context.make_tuple(builder, kind, [_borrowed(context, builder, *part) for part in parts])
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()


def _fork(context: Any, builder: Any, share: Any, arguments: Any, threads: Any) -> None:
    """Writes the call of `GOMP_parallel` with a function that calls `share` with its thread's number."""
    module = builder.module
    data = cgutils.alloca_once_value(builder, arguments)
    name = module.get_unique_name("share")
    outlined = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
    outlined.linkage = "internal"
    inside = ir.IRBuilder(outlined.append_basic_block())

    def number(name: str) -> Any:
        asked = cgutils.get_or_insert_function(module, ir.FunctionType(_INT, []), name)
        return inside.sext(inside.call(asked, []), ir.IntType(64))

    values = cgutils.unpack_tuple(inside, inside.load(inside.bitcast(outlined.args[0], data.type)))
    context.active_code_library.add_linking_library(share.library)
    function = context.declare_function(module, share.fndesc)
    numbers = [number("omp_get_thread_num"), number("omp_get_num_threads")]
    context.call_conv.call_function(
        inside, function, share.signature.return_type, share.signature.args, [*numbers, *values]
    )
    inside.ret_void()
    call = ir.FunctionType(ir.VoidType(), [_POINTER, _POINTER, _INT, _INT])
    start = cgutils.get_or_insert_function(module, call, "GOMP_parallel")
    builder.call(start, [builder.bitcast(outlined, _POINTER), builder.bitcast(data, _POINTER), threads, _INT(0)])


_F32, _BF16 = "float32[:, ::1]", "uint16[:, ::1]"


@_shared
def _norm_rows(
    number: int, of: int, x: np.ndarray, more: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray
) -> None:
    rows, size = x.shape
    for row in range(rows * number // of, rows * (number + 1) // of):
        stream, found = x[row], out[row]
        if len(more):
            added = more[row]
            for i in range(size):
                stream[i] += _wide(added[i])
        total = np.float32(0)
        for i in range(size):
            total += stream[i] * stream[i]
        factor = np.float32(1) / np.sqrt(total / np.float32(size) + np.float32(eps))
        for i in range(size):
            _put(found, i, stream[i] * factor * weight[i])


@_kernel(
    f"{_F32}, {_F32}, float32[::1], float64, {_F32}, int32", f"{_F32}, {_BF16}, float32[::1], float64, {_BF16}, int32"
)
def rms_norm(x: np.ndarray, more: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, threads: int) -> None:
    """x += more, and out = x / sqrt(mean(x^2) + eps) * weight of every row; [B, n], [B or 0, n], [n], [B, n]."""
    _norm_rows((x, more, weight, eps, out), threads)


@_inlined()
def _lines_of(rows: np.ndarray, first: int, last: int, lines: np.ndarray) -> None:
    """lines float32 [4, dim] = rows `first` to `first` + 3 of [.., dim], of which those after `last` are `last`'s."""
    for n in range(4):
        row, line = rows[min(first + n, last)], lines[n]
        for i in range(len(line)):
            line[i] = _wide(row[i])


def _score(query: Any, keys: Any, first: Any, here: Any, lines: Any, scores: Any) -> None:
    """scores [group, tokens] = query [group, dim] k of the cached keys of a head from token `first` to `here`."""
    raise NotImplementedError


@overload(_score, jit_options={"fastmath": _inlined.keywords["fastmath"]})
def _score_of(query: Any, keys: Any, first: Any, here: Any, lines: Any, scores: Any) -> Any:
    # Slices of one dimension and loops from 0 are what the compiler turns into vector instructions.
    if keys.dtype == types.float32:

        def score(query: Any, keys: Any, first: Any, here: Any, lines: Any, scores: Any) -> None:
            tokens = here + 1 - first
            for head in range(len(query)):
                seen = scores[head]
                seen[:] = 0
                for i in range(len(keys)):
                    factor, key = query[head, i], keys[i, first : here + 1]
                    for token in range(tokens):
                        seen[token] += factor * key[token]

    else:

        def score(query: Any, keys: Any, first: Any, here: Any, lines: Any, scores: Any) -> None:
            a, b, c, d = lines[0], lines[1], lines[2], lines[3]
            for token in range(0, here + 1 - first, 4):
                _lines_of(keys, first + token, here, lines)
                for head in range(len(query)):
                    one = query[head]
                    of_a = of_b = of_c = of_d = np.float32(0)
                    for i in range(len(a)):
                        of_a += one[i] * a[i]
                        of_b += one[i] * b[i]
                        of_c += one[i] * c[i]
                        of_d += one[i] * d[i]
                    seen = scores[head, token : token + 4]
                    seen[0], seen[1], seen[2], seen[3] = of_a, of_b, of_c, of_d

    return score


@_inlined()
def _rotate(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, norm: np.ndarray, eps: float, scale: float, out: np.ndarray
) -> None:
    """out [dim] = scale x [dim], normed where `norm` [dim or 0] has weights, rotated."""
    dim = len(x)
    for i in range(dim):
        out[i] = _wide(x[i]) * np.float32(scale)
    if len(norm):
        total = np.float32(0)
        for i in range(dim):
            total += _wide(x[i]) * _wide(x[i])
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


@_inlined()
def _score_width(positions: np.ndarray) -> int:
    """Scores of a row: all its tokens and up to three more, in whole cache lines."""
    return -(-(positions.max() + 4) // 16) * 16


@_shared
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
    lines, own = own[2 * size : 2 * size + 4 * dim].reshape(4, dim), own[2 * size + 4 * dim :]
    scores, totals = own[: group * width].reshape(group, width), own[group * width :]
    for unit in range(rows * kv_heads * number // of, rows * kv_heads * (number + 1) // of):
        row, kv = unit // kv_heads, unit % kv_heads
        here = positions[row]
        first = max(0, here + 1 - window) if window else 0
        tokens = here + 1 - first
        parts = mixed[row].reshape(-1, dim)
        for head in range(group):
            _rotate(parts[kv * group + head], cos[row], sin[row], norms[0], eps, scale, query[head])
        _rotate(parts[heads + kv], cos[row], sin[row], norms[1], eps, 1.0, lines[0])
        _store_key(keys[row, kv], here, lines[0])
        new, place = parts[heads + kv_heads + kv], values[row, kv, here]
        for i in range(dim):
            _put(place, i, _wide(new[i]))
        _score(query, keys[row, kv], first, here, lines, scores)
        for head in range(group):
            seen = scores[head]
            highest, total = _highest(seen[:tokens]), np.float32(0)
            for token in range(tokens):
                seen[token] = _exp(seen[token] - highest)
                total += seen[token]
            seen[tokens : tokens + 3] = 0
            totals[head] = total
        found[:] = 0
        for token in range(0, tokens, 4):
            _lines_of(values[row, kv], first + token, here, lines)
            a, b, c, d = lines[0], lines[1], lines[2], lines[3]
            for head in range(group):
                sums, seen = found[head], scores[head, token : token + 4]
                of_a, of_b, of_c, of_d = seen[0], seen[1], seen[2], seen[3]
                for i in range(dim):
                    sums[i] += of_a * a[i] + of_b * b[i] + of_c * c[i] + of_d * d[i]
        for head in range(group):
            result = out[row, (kv * group + head) * dim : (kv * group + head + 1) * dim]
            for i in range(dim):
                _put(result, i, found[head, i] / totals[head])


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
                _put(place, i, key[i])

    return store


def _attend_signature(mixed: str, cache: str) -> str:
    stored = f"{cache}[:, :, :, ::1]"
    norms = "UniTuple(float32[::1], 2), float64"
    return f"{mixed}, {_F32}, {_F32}, int64[::1], {stored}, {stored}, {norms}, float64, int64, {mixed}, int32"


@_kernel(_attend_signature(_F32, "float32"), _attend_signature(_F32, "uint16"), _attend_signature(_BF16, "uint16"))
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
        values: the cache, [rows, kv heads, capacity, dim].
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


@_kernel(f"{_F32}, {_F32}")
def silu_multiply(gate_up: np.ndarray, out: np.ndarray) -> None:
    """silu(gate) * up; [B, 2 n], gate before up, and [B, n]."""
    size = out.shape[1]
    for row in range(out.shape[0]):
        gate, up, found = gate_up[row, :size], gate_up[row, size:], out[row]
        for i in range(size):
            found[i] = gate[i] / (np.float32(1) + _exp(-gate[i])) * up[i]


@_shared
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
                wide_line[i] = _wide(line[i])
        for row in range(len(x)):
            total, factors = np.float32(0), x[row]
            if len(x) > 1:
                for i in range(size):
                    total += wide_line[i] * factors[i]
            else:
                for i in range(size):
                    total += _wide(line[i]) * factors[i]
            out[row, place] = total + start + out[row, place] if add else total + start


@_kernel(f"{_BF16}, float32[::1], {_F32}, float32[:, :], boolean, int32")
def multiply(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, out: np.ndarray, add: bool, threads: int) -> None:
    """out = W x + b of a few rows with bfloat16 weights, or out += that; [out, in], [out or 0], [B, in], [B, out].

    It reads the weights once, as fast as memory gives them; oneDNN's product of one row reaches half of that.
    """
    memory = np.empty((threads, weight.shape[1]), np.float32)
    _multiply_lines((weight, bias, x, out, add, memory), threads)


@_shared
def _sum_blocks(number: int, of: int, scores: np.ndarray, highest: np.ndarray, sums: np.ndarray, block: int) -> None:
    rows = len(scores)
    for row in range(rows * number // of, rows * (number + 1) // of):
        line = scores[row]
        top = _highest(line)
        highest[row] = top
        for place in range(sums.shape[1]):
            part, total = line[place * block : (place + 1) * block], np.float32(0)
            for i in range(len(part)):
                total += _exp(_wide(part[i]) - top)
            sums[row, place] = total


def _sums_signature(scores: str) -> str:
    return f"{scores}, float32[::1], {_F32}, int64, int32"


@_kernel(_sums_signature(_F32), _sums_signature(_BF16))
def block_sums(scores: np.ndarray, highest: np.ndarray, sums: np.ndarray, block: int, threads: int) -> None:
    """The largest of each row, and the sums of e^(x - largest) over blocks of its columns.

    [B, V] with a finite number in each row, [B], [B, ceil(V / block)].
    """
    _sum_blocks((scores, highest, sums, block), threads)
