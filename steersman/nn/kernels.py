"""Which kernels run on what a tensor is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steersman.nn import gpu_kernels


def kernels_of(tensor: Tensor, *others: torch.dtype) -> Any:
    """`gpu_kernels` or `cpu_kernels`, which have the same functions; None: plain operations have to do.

    Args:
        others: number formats beside the tensor's that take part.
    """
    if tensor.is_cuda:
        return gpu_kernels if gpu_kernels.usable(tensor) else None
    if not tensor.is_cpu or not {tensor.dtype, *others} <= {torch.float32, torch.bfloat16}:
        return None
    from steersman.nn import cpu_kernels  # compiles where nothing is cached

    return cpu_kernels
