"""Weights as a safetensors file, written once, and its digest."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
from blake3 import blake3
from safetensors import safe_open
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_BUFFERS = 512
"""Of one `pwritev`; the system's limit is 1024."""


def anonymous_file() -> IO[bytes]:
    """A file without a name that is gone when it is closed: in memory where the system can, which is Linux."""
    return os.fdopen(os.memfd_create("weights"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def write_safetensors(tensors: Mapping[str, Tensor], file: IO[bytes]) -> None:
    """Writes what `safetensors.torch.save_file` does for float32, bfloat16 and float16 tensors.

    That function goes through a copy of everything, on one thread; this one copies once, on all.

    Raises:
        OSError: there is no room.
    """
    header: dict[str, object] = {}
    parts: list[memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        part = values.reshape(-1).view(torch.uint8).numpy().data
        start, end = end, end + part.nbytes
        header[name] = {"dtype": _NAMES[values.dtype], "shape": list(values.shape), "data_offsets": [start, end]}
        parts.append(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts.insert(0, memoryview(len(text).to_bytes(8, "little") + text))
    size = sum(part.nbytes for part in parts)
    os.ftruncate(file.fileno(), size)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda job: _write(file.fileno(), *job), _shares(parts, size // threads + 1)))


def _shares(parts: Sequence[memoryview], size: int) -> list[tuple[int, list[memoryview]]]:
    """(offset, buffers) of about `size` bytes each; a large buffer is split."""
    shares: list[tuple[int, list[memoryview]]] = []
    offset = room = 0
    for part in parts:
        while part.nbytes:
            if not room:
                shares.append((offset, []))
                room = size
            piece, part = part[:room], part[room:]
            shares[-1][1].append(piece)
            offset, room = offset + piece.nbytes, room - piece.nbytes
    return shares


def _write(descriptor: int, offset: int, buffers: list[memoryview]) -> None:
    while buffers:
        written = os.pwritev(descriptor, buffers[:_BUFFERS], offset)
        offset += written
        while written and written >= buffers[0].nbytes:
            written -= buffers.pop(0).nbytes
        if written:
            buffers[0] = buffers[0][written:]


def mapped(file: IO[bytes] | Path) -> mmap.mmap:
    """A file that is not empty as read-only memory.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return mapped(opened)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, as views of the mapped file.

    `safetensors.torch.load_file` does the same, but its 0.8.0 keeps 64 bytes for ever of each tensor that it makes, and
    a service loads an update with every step. The library still checks the header, and makes tensors of other types.

    Raises:
        OSError: it cannot be opened.
        safetensors.SafetensorError: it is not whole, or no such file.
    """
    with safe_open(path, "pt") as checked, path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        return {
            name: _view(data, begin, entry) if entry["dtype"] in _DTYPES else checked.get_tensor(name)
            for name, entry in header.items()
        }


def _view(data: mmap.mmap, begin: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, (start, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
    if start == end:
        return torch.empty(entry["shape"], dtype=dtype)
    values = torch.frombuffer(data, dtype=dtype, count=(end - start) // dtype.itemsize, offset=begin + start)
    return values.view(entry["shape"])


def digest_of(data: bytes | mmap.mmap) -> str:
    """BLAKE3, 256 bits, lower-case hexadecimal; on all cores."""
    return blake3(data, max_threads=blake3.AUTO).hexdigest()
