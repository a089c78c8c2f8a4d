"""What happens to memory that is freed."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""`M_TRIM_THRESHOLD` and `M_MMAP_MAX` of malloc.h."""


def keep_freed_memory() -> None:
    """Lets glibc keep it for the next allocation, however large, instead of giving it back to the kernel.

    Every training step asks for the same gradients and logits again, and the kernel clears each page of them anew: a
    sixth of a step that trains all weights. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
