"""Device, precision and threads: measured where it can be, decided in one place for services and training."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from steersman.errors import ConfigError, FailedPreconditionError

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

# A change of arithmetic has to pay.
_GAIN = 1.15


def pick_device(device: str = "auto") -> str:
    """`cpu` or `cuda`; FailedPreconditionError when CUDA is asked for and missing."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"model.device is {device!r}; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise FailedPreconditionError("model.device is cuda, but torch sees no CUDA device; use auto or cpu")
    return device


def pick_precision(precision: str = "auto", device: str = "cpu") -> Precision:
    """Arithmetic of matrix products on a device.

    `auto`: bf16 on a GPU that has it; on a CPU a benchmark of less than 100 ms decides, because some CPUs multiply
    bf16 three times faster than fp32 (Zen 5, AMX) and others at half the speed.
    """
    if precision in ("fp32", "bf16"):
        return precision  # type: ignore[return-value]
    if precision != "auto":
        raise ConfigError(f"model.precision is {precision!r}; use auto, fp32 or bf16")
    if device != "cpu":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if remembered_gain("bf16", cpu_bf16_gain) >= _GAIN else "fp32"


def remembered_gain(name: str, measure: Callable[[], float]) -> float:
    """How many times as fast one arithmetic is as another, measured once for this processor and torch.

    What is measured decides which kernels run, and so the last bits of every number. A busy moment must not decide
    otherwise for the next process: a run that was killed would not continue to the same weights. The first process of
    a machine that measures decides for all; where nothing can be written, each decides for itself.

    Args:
        name: of what is compared; part of a file name.
        measure: gives the factor.
    """
    key = hashlib.sha256(f"{_processor()} torch {torch.__version__}".encode()).hexdigest()[:16]
    try:
        memory = Path.home() / ".cache" / "steersman" / "hardware" / f"{key}-{name}"
        if not memory.is_file():
            memory.parent.mkdir(parents=True, exist_ok=True)
            partial = memory.with_name(f".{memory.name}.{os.getpid()}")
            partial.write_text(f"{measure():.3f}\n")
            with contextlib.suppress(FileExistsError):
                os.link(partial, memory)  # never replaces what another process has decided meanwhile
            partial.unlink()
        return float(memory.read_text())
    except (OSError, RuntimeError, ValueError):  # no home, nothing writable, or not our file
        return measure()


@functools.cache
def _processor() -> str:
    """Name of the processor with a digest of what it can do: names of virtual ones say little."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    said = {name.strip(): value.strip() for name, value in facts.items()}
    able = "|".join(said.get(name, "") for name in ("vendor_id", "cpu family", "model", "flags", "Features"))
    return f"{said.get('model name', platform.machine())} {hashlib.sha256(able.encode()).hexdigest()[:12]}"


def cpu_bf16_gain(size: int = 512) -> float:
    """Speed of a bf16 matrix product relative to fp32 on this CPU."""
    fp32, bf16 = best_seconds([_product(torch.float32, size), _product(torch.bfloat16, size)])
    return fp32 / bf16


def _product(dtype: torch.dtype, size: int) -> Callable[[], Tensor]:
    """A layer's product: activations [tokens, width] times a weight in the layout of nn.Linear."""
    left = torch.ones(size, size, dtype=dtype)
    weight = torch.ones(2 * size, size, dtype=dtype)
    return lambda: torch.nn.functional.linear(left, weight)


def best_seconds(works: Sequence[Callable[[], object]], budget: float = 0.08) -> list[float]:
    """Shortest run of each on one thread, within a shared budget in seconds.

    In turns, the shortest, and one thread, because other processes on the machine only add time, not evenly, and
    most of all where threads wait for one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for work in works:
            work()
        best, until = [float("inf")] * len(works), time.perf_counter() + budget
        while time.perf_counter() < until:
            for number, work in enumerate(works):
                start = time.perf_counter()
                work()
                best[number] = min(best[number], time.perf_counter() - start)
        return best
    finally:
        torch.set_num_threads(threads)


def set_threads(threads: int = 0) -> int:
    """Sets the CPU threads of this process and returns their number; 0: all cores that it may use."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


@functools.cache
def use_fast_exact_matmul(size: int = 512) -> bool:
    """Switches fp32 products on CPU to oneDNN (`matmul_precision("medium")`) where that is exact and faster.

    MKL runs at half speed on AMD; oneDNN does not. But with AMX, "medium" rounds to bf16, so the error is measured
    against float64 first. Returns whether it was switched. Where fp32 is to be reproduced on other hardware, leave it.
    """
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        return before == "medium"
    product = _product(torch.float32, size)

    def with_onednn() -> None:
        torch.set_float32_matmul_precision("medium")
        product()
        torch.set_float32_matmul_precision(before)

    def onednn_gain() -> float:
        slow, fast = best_seconds([product, with_onednn])
        return slow / fast

    gain = remembered_gain("onednn", onednn_gain)
    torch.set_float32_matmul_precision("medium")
    if gain >= _GAIN and _relative_error(size) < 1e-6:
        return True
    torch.set_float32_matmul_precision(before)
    return False


def _relative_error(size: int) -> float:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact: Tensor = left.double() @ right.double()
    return float(((left @ right).double() - exact).abs().max() / exact.abs().max())


def array_of(tensor: Tensor) -> np.ndarray:
    """The same memory, on a CPU; bfloat16 as the uint16 that numpy knows."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
