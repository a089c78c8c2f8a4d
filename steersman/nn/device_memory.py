"""Weights in a GPU's memory that other processes on the machine read in place (CUDA inter-process communication).

The payload lies in one buffer on the device. What travels is a small file beside it: the buffer's handle, which GPU it
is on, and where each tensor lies. A handle is good as long as its owner lives and only for the same user's processes.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from steersman.errors import FailedPreconditionError, why

SUFFIX = ".device.json"
_ALIGN = 256
_WORDS = 1 << 17
"""64-bit words that one sum of the digest covers."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 64)]


class Buffer:
    """Memory of the device, made here (`allocate`) or in another process (`opened`)."""

    def __init__(self, address: int, size: int, device: torch.device, release: str) -> None:
        self._address, self._release = address, release
        self.size = size
        described = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
        holder = type("Memory", (), {"__cuda_array_interface__": described})()
        self.bytes: Tensor = torch.as_tensor(holder, device=device)
        """uint8 [size]"""

    @staticmethod
    def allocate(size: int, device: torch.device) -> Buffer:
        """Raises MemoryError."""
        address = ctypes.c_uint64()
        _bind(device)
        if _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size)):
            raise MemoryError(f"the GPU has no room for {size} bytes")
        return Buffer(int(address.value), size, device, "cuMemFree_v2")

    @staticmethod
    def opened(handle: bytes, size: int, device: torch.device) -> Buffer:
        """Raises FailedPreconditionError."""
        address, given = ctypes.c_uint64(), _Handle()
        ctypes.memmove(ctypes.byref(given), handle, 64)
        _bind(device)
        code = _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(1))
        if code:
            raise FailedPreconditionError(
                f"the weights in the GPU's memory cannot be opened (CUDA error {code}); "
                "do trainer and replica run on one machine, as one user?"
            )
        return Buffer(int(address.value), size, device, "cuIpcCloseMemHandle")

    def handle(self) -> bytes:
        found = _Handle()
        _bind(self.bytes.device)
        code = _call("cuIpcGetMemHandle", ctypes.byref(found), ctypes.c_uint64(self._address))
        if code:
            raise MemoryError(f"the GPU's memory cannot be shared (CUDA error {code})")
        return ctypes.string_at(ctypes.byref(found), 64)

    def close(self) -> None:
        if self._address:
            device = self.bytes.device
            torch.cuda.synchronize(device)
            _bind(device)
            _call(self._release, ctypes.c_uint64(self._address))
            self._address = 0


class DeviceOutbox:
    """The last payload in memory of the GPU; the next one takes its place."""

    def __init__(self) -> None:
        self._buffer: Buffer | None = None

    def put(self, tensors: Mapping[str, Tensor], path: Path) -> tuple[int, str]:
        """Copies tensors of one GPU and describes them in `path`; returns (bytes, digest).

        Raises:
            MemoryError: the GPU has no room, or does not share memory.
        """
        device = next(iter(tensors.values())).device
        layout: dict[str, Any] = {}
        end = 0
        for name, tensor in tensors.items():
            layout[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "offset": end}
            end = -(-(end + tensor.nbytes) // _ALIGN) * _ALIGN
        size = -(-end // (8 * _WORDS)) * 8 * _WORDS
        if self._buffer is None or self._buffer.size != size:
            self.close()
            self._buffer = Buffer.allocate(size, device)
            self._buffer.bytes.zero_()
        for name, tensor in tensors.items():
            _view(self._buffer.bytes, layout[name]).copy_(tensor)
        described = {"gpu": _uuid(device), "handle": self._buffer.handle().hex(), "size": size, "tensors": layout}
        digest = _digest(self._buffer.bytes, layout)
        torch.cuda.synchronize(device)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(described))
        partial.replace(path)
        return size, digest

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None


@contextmanager
def opened_tensors(path: Path) -> Iterator[tuple[dict[str, Tensor], int, str]]:
    """(tensors, bytes, digest) of what `DeviceOutbox.put` described; they must not be used afterwards.

    Raises:
        FailedPreconditionError: it is on another machine, GPU or user's, or not described in full.
    """
    try:
        described = json.loads(path.read_bytes())
        handle, size, layout = bytes.fromhex(described["handle"]), int(described["size"]), described["tensors"]
        fits = len(handle) == 64 and size % (8 * _WORDS) == 0 and all(_fits(one, size) for one in layout.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FailedPreconditionError(f"{path} does not describe weights ({why(error)})") from None
    if not fits:
        raise FailedPreconditionError(f"{path} does not describe weights: its numbers do not fit each other")
    if not torch.cuda.is_available() or _uuid(torch.device("cuda", torch.cuda.current_device())) != described["gpu"]:
        raise FailedPreconditionError(f"{path}: the weights are in the memory of a GPU that this replica does not use")
    device = torch.device("cuda", torch.cuda.current_device())
    buffer = Buffer.opened(handle, size, device)
    try:
        yield {name: _view(buffer.bytes, one) for name, one in layout.items()}, size, _digest(buffer.bytes, layout)
    finally:
        buffer.close()


def _fits(one: Mapping[str, Any], size: int) -> bool:
    shape, offset = one["shape"], one["offset"]
    numbers = [*shape, offset]
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or offset % _ALIGN:
        return False
    return offset + math.prod(shape) * _DTYPES[one["dtype"]].itemsize <= size


def _view(memory: Tensor, one: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[one["dtype"]], one["shape"]
    return memory[one["offset"] :][: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _digest(memory: Tensor, layout: Mapping[str, Any]) -> str:
    """256 bits over names, places and, by sums with fixed odd factors modulo 2^64, every word of the memory."""
    factors = _factors(memory.device)
    words = memory.view(torch.int64).view(-1, _WORDS)
    sums = torch.cat([(part * factors).sum(1) for part in words.split(64)])
    return blake3(json.dumps(layout, sort_keys=True).encode() + sums.cpu().numpy().tobytes()).hexdigest()


@functools.cache
def _factors(device: torch.device) -> Tensor:
    drawn = np.random.Generator(np.random.PCG64(1)).integers(-(1 << 63), (1 << 63) - 1, _WORDS, np.int64) | 1
    return torch.from_numpy(drawn).to(device)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> int:
    return int(getattr(_driver(), name)(*arguments))


def _bind(device: torch.device) -> None:
    """Makes the device's context that of this thread, which the driver's functions want."""
    torch.zeros(1, device=device)
