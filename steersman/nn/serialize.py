"""Tensors to the bytes of a safetensors file, in one copy, and their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def to_safetensors(tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """What `safetensors.torch.save` returns for float32, bfloat16 and float16 tensors, and its SHA-256.

    That function copies everything three times, which for full weights takes as long as sending them. The digest is
    computed from the tensors while they are copied.
    """
    header: dict[str, object] = {}
    raws: list[memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        raw = values.reshape(-1).view(torch.uint8).numpy().data
        start, end = end, end + raw.nbytes
        header[name] = {"dtype": _NAMES[values.dtype], "shape": list(values.shape), "data_offsets": [start, end]}
        raws.append(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text, *raws]

    def digest() -> str:
        sha256 = hashlib.sha256()
        for part in parts:
            sha256.update(part)
        return sha256.hexdigest()

    with ThreadPoolExecutor(1) as thread:
        hashed = thread.submit(digest)
        return b"".join(parts), hashed.result()
