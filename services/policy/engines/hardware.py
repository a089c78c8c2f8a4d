"""What this machine computes fast: device, number format, layout of linear weights."""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch
from torch import Tensor

from steersman.errors import ConfigError

PACKING_ROWS = 64
"""Batch size that the blocked weight layout is made for; measured good for every other size above 1, too."""

Precision = Literal["auto", "fp32", "bf16"]


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
    seconds = {dtype: _seconds_per_token(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=lambda dtype: seconds[dtype])


@torch.no_grad()
def _seconds_per_token(dtype: torch.dtype) -> float:
    weight = pack_weight(torch.full((1536, 576), 0.01, dtype=dtype))
    total = 0.0
    for rows in (16, 64, 256):
        x = torch.full((rows, 576), 0.01, dtype=dtype)
        best = float("inf")
        for _ in range(6):  # the shortest of several: other work on the machine only ever adds time
            start = time.perf_counter()
            packed_linear(x, weight)
            best = min(best, time.perf_counter() - start)
        total += best / rows
    return total
