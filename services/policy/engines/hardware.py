"""What this machine computes fast: device, number format, layout of linear weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from steersman.errors import ConfigError
from steersman.nn.hardware import best_seconds, pick_precision, remembered_gain

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
    """ "auto": bfloat16 on a GPU that computes it; on a CPU what the trainer takes, too (`pick_precision`), where the
    engine has fast products for it.
    """
    if precision != "auto":
        return torch.float32 if precision == "fp32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = packs_weights(device, torch.bfloat16) and pick_precision("auto", "cpu") == "bf16"
    return torch.bfloat16 if fast else torch.float32


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


def _packing_pays() -> bool:
    return remembered_gain("packed", _packing_gain) > _PACKING_GAIN


def _packing_gain() -> float:
    x, transposed = torch.full((64, 576), 0.01), torch.full((576, 1536), 0.01)
    packed = pack_weight(torch.full((1536, 576), 0.01))
    with torch.no_grad():
        slow, fast = best_seconds([lambda: torch.mm(x, transposed), lambda: packed_linear(x, packed)])
    return slow / fast
