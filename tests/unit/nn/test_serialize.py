"""The bytes that carry weights."""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import load

from steersman.nn.serialize import to_safetensors


def test_safetensors_reads_what_was_written() -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "view": torch.randn(4, 6).T,
        "parameter": torch.nn.Parameter(torch.randn(7)),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 2),
    }
    data, digest = to_safetensors(tensors)
    assert digest == hashlib.sha256(data).hexdigest()
    found = load(data)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
