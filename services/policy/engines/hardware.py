"""What this machine computes fast: device, number format, layout of linear weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from steersman.errors import ConfigError

PACKING_ROWS = 64
"""Batch size that the blocked weight layout is made for; measured good for every other size above 1, too."""

Precision = Literal["auto", "fp32", "bf16"]
Layout = Literal["plain", "packed", "transposed"]
"""Of linear weights: as in the checkpoint; oneDNN's blocks; [in, out]."""

_PACKING_GAIN = 1.25
"""float32 is packed where that is faster by this factor: packed weights cost a second copy and a slower update."""


def resolve_device(name: str) -> torch.device:
    """ "auto": CUDA where there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is '{name}', use 'auto', 'cpu' or 'cuda:0'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is '{name}' but this machine has no usable CUDA device; use 'auto' or 'cpu'")
    return device


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 on a GPU that computes it; on a CPU float32 unless bfloat16 is measured to be faster."""
    if precision != "auto":
        return torch.float32 if precision == "fp32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return _faster_cpu_dtype()


def packs_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's blocked weight layout can be used."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def weight_layout(device: torch.device, dtype: torch.dtype) -> Layout:
    """What is fast here. float32 on a CPU is measured: MKL's product with a [in, out] weight is as fast as oneDNN's
    packed one on Intel, and half as fast on AMD.
    """
    if not packs_weights(device, dtype):
        return "plain"
    return "transposed" if dtype == torch.float32 and not _packing_pays() else "packed"


def pack_weight(weight: Tensor) -> Tensor:
    """[out, in] row-major -> oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKING_ROWS)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x W^T + b with a weight from `pack_weight`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "")


@functools.cache
def _faster_cpu_dtype() -> torch.dtype:
    """float32 or bfloat16, by the time of decode-like and prefill-like products (about 50 ms, once a process).

    A CPU without bfloat16 instructions, or with slow ones, is often faster and always more exact in float32.
    """
    if not packs_weights(torch.device("cpu"), torch.bfloat16):
        return torch.float32
    seconds = {dtype: _seconds_per_token(_packed_product(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=lambda dtype: seconds[dtype])


@functools.cache
def _packing_pays() -> bool:
    return _seconds_per_token(_transposed_product()) > _PACKING_GAIN * _seconds_per_token(
        _packed_product(torch.float32)
    )


Product = Callable[[int], Callable[[], Tensor]]
"""From a number of rows to a layer's product with them."""


def _packed_product(dtype: torch.dtype) -> Product:
    weight = pack_weight(torch.full((1536, 576), 0.01, dtype=dtype))

    def of(rows: int) -> Callable[[], Tensor]:
        x = torch.full((rows, 576), 0.01, dtype=dtype)
        return lambda: packed_linear(x, weight)

    return of


def _transposed_product() -> Product:
    weight = torch.full((576, 1536), 0.01)

    def of(rows: int) -> Callable[[], Tensor]:
        x = torch.full((rows, 576), 0.01)
        return lambda: torch.mm(x, weight)

    return of


@torch.no_grad()
def _seconds_per_token(product: Product) -> float:
    total = 0.0
    for rows in (16, 64, 256):
        run = product(rows)
        best = float("inf")
        for _ in range(6):  # the shortest of several: other work on the machine only ever adds time
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
        total += best / rows
    return total
