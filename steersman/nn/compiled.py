"""Compiled functions over numpy arrays (numba) that torch's own threads share, in float32 and bfloat16.

Numba compiles them when their module is imported. Its own threads would be a second pool beside torch's, and two that
spin on the same cores slow each other many times over. So `shared` asks the OpenMP runtime that torch has loaded, by
the call that GCC compiles `#pragma omp parallel` to; Intel's and LLVM's runtimes know it, too. bfloat16 numbers are
uint16 to numpy (`hardware.array_of`): `wide` reads and `put` writes an element of either format.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
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

_SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]

F32, BF16 = "float32[:, ::1]", "uint16[:, ::1]"
"""Types of arrays of two dimensions."""

inlined = partial(njit, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz", "afn"}, error_model="numpy")
"""For what kernels call. Sums in any order, but what is not a number stays visible."""


def kernel(*signatures: str) -> Callable[[Callable[..., None]], Any]:
    """A function that is compiled for these arguments when its module is imported; the result is kept where one may
    write.
    """
    compiled = partial(inlined, [f"void({one})" for one in signatures])

    def decorate(function: Callable[..., None]) -> Any:
        # Numba keeps results by this name and by the date of the function's own file, not of this one.
        function.__qualname__ += f"_{_SOURCE}"
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


def wide(value: Any) -> Any:
    """An element as float32: of float32 or of bfloat16 (uint16). Of compiled code only."""
    raise NotImplementedError


@overload(wide, jit_options={"fastmath": inlined.keywords["fastmath"]})
def _wide_of(value: Any) -> Any:
    if value == types.float32:

        def widen(value: Any) -> Any:
            return value
    else:

        def widen(value: Any) -> Any:
            return _float_of(np.uint32(value) << np.uint32(16))

    return widen


def put(out: Any, i: int, value: Any) -> None:
    """out[i] = value, a float32, rounded to nearest even where `out` is bfloat16 (uint16). Of compiled code only."""
    raise NotImplementedError


@overload(put, jit_options={"fastmath": inlined.keywords["fastmath"]})
def _put_of(out: Any, i: Any, value: Any) -> Any:
    if out.dtype == types.float32:

        def store(out: Any, i: Any, value: Any) -> None:
            out[i] = value
    else:

        def store(out: Any, i: Any, value: Any) -> None:
            bits = _bits_of(value)
            out[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return store


@inlined()
def exp(x: Any) -> Any:
    """e^x of a float32 within 3e-7 of itself; 0 below -87, e^88 above 88. It calls nothing, so loops of it become
    vector instructions.
    """
    given = x
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
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
def largest(line: np.ndarray) -> Any:
    """Of the numbers among them, a vector instruction at a time, which is compiled only where all may be numbers."""
    top = np.float32(-np.inf)
    for i in range(len(line)):
        top = max(top, wide(line[i]))
    return top


def shared(share: Callable[..., None]) -> Any:
    """Makes `f(arguments, threads)` of `share(number, of, *arguments)`, both for compiled code: calls it with the
    numbers 0 to `of` - 1, each on a thread of its own, and waits. The runtime may give fewer than `threads`. It raises
    nothing.
    """
    compiled = inlined()(share)

    @_intrinsic
    def fork(typing: Any, arguments: Any, threads: Any) -> Any:
        call = (types.int64, types.int64, *arguments.types)
        typing.resolve_function_type(types.Dispatcher(compiled), call, {})

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _fork(context, builder, compiled.overloads[call], *args)
            return context.get_dummy_value()

        return types.void(arguments, types.int32), generate

    @inlined()
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
