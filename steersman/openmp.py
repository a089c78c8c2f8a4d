"""The OpenMP runtime behind torch's CPU kernels.

libtorch brings GNU's. Its threads wait at every barrier either asleep or spinning: asleep, a decoding step of one
request takes three times as long; spinning, two processes on the same cores slow each other twentyfold; and with a
second Python thread that ever computed, they sleep in any case. Intel's (LLVM's) threads spin and yield the core to
whoever wants it. PyTorch's CPU tuning guide preloads it for the same reasons. See docs/performance.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from importlib import metadata
from pathlib import Path

_LIBRARY = "libiomp5.so"
_SPIN_MS = "10"
"""Longer than the time between two parallel sections; its own default of 200 heats an idle service for nothing."""


def prefer_yielding_threads() -> bool:
    """Loads Intel's runtime, whose symbols then precede those of GNU's; must run before torch is imported.

    Returns:
        Whether it is in place; false where the package `intel-openmp` is not made for this machine (only Linux on
        x86-64) or not installed: then GNU's runtime stays.
    """
    remove_left_behind(own=_LIBRARY not in Path("/proc/self/maps").read_text())
    try:
        files = metadata.files("intel-openmp") or []
        path = next(file.locate() for file in files if file.name == _LIBRARY)
        os.environ.setdefault("KMP_BLOCKTIME", _SPIN_MS)
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except (metadata.PackageNotFoundError, StopIteration, OSError):
        return False
    return True


def remove_left_behind(folder: Path = Path("/dev/shm"), *, own: bool = False) -> int:
    """Removes the kilobyte of shared memory that the runtime registers itself with (`__KMP_REGISTERED_LIB_PID_UID`) of
    our processes that were killed; returns how many.

    Args:
        folder: where it lies.
        own: this process has not loaded the runtime yet, so what carries its number was left by another. A container
            that is started again has the same numbers and memory, and the runtime aborts where it finds itself.
    """
    count = 0
    for path in folder.glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        pid = path.name.split("_")[-2]
        if not pid.isdigit():
            continue
        try:
            if own and int(pid) == os.getpid():
                raise ProcessLookupError
            os.kill(int(pid), 0)
        except ProcessLookupError:
            with contextlib.suppress(OSError):
                path.unlink()
                count += 1
        except OSError:
            continue
    return count
