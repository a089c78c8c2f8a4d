"""Weights that stay in a GPU's memory: what another process reads is what was put there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steersman.errors import FailedPreconditionError
from steersman.nn.device_memory import SUFFIX, DeviceOutbox, opened_tensors

NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here; `make gpu-check` runs this on a machine that has one"
)
READER = """
import sys
from pathlib import Path
from steersman.nn.device_memory import opened_tensors
with opened_tensors(Path(sys.argv[1])) as (tensors, size, digest):
    print(size, digest, *(f"{name}:{tensor.double().sum().item():.6f}" for name, tensor in tensors.items()))
"""


@pytest.mark.gpu
@NEEDS_GPU
def test_another_process_reads_what_was_put(tmp_path: Path) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    outbox, path = DeviceOutbox(), tmp_path / f"weights{SUFFIX}"
    seen = []
    for round_number in range(2):  # the second payload lies in the memory of the first
        tensors = {
            "a": torch.randn(1000, 700, generator=generator, device="cuda"),
            "b": torch.randn(33, generator=generator, device="cuda").to(torch.bfloat16),
        }
        size, digest = outbox.put(tensors, path)
        found = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        words = found.stdout.split()
        assert words[:2] == [str(size), digest]
        assert words[2:] == [f"{name}:{tensor.double().sum().item():.6f}" for name, tensor in tensors.items()]
        seen.append(digest)
        tensors["b"][5] += 1
        assert outbox.put(tensors, path)[1] != digest, f"one number has changed in round {round_number}"
    assert seen[0] != seen[1]
    outbox.close()


ONE = {"dtype": "F32", "shape": [3], "offset": 0}
GOOD = {"gpu": "none", "handle": "00" * 64, "size": 1 << 20, "tensors": {"a": ONE}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a GPU that this replica does not use"),
        ({"size": 100}, "do not fit"),
        ({"handle": "00"}, "do not fit"),
        ({"handle": "no"}, "does not describe weights"),
        ({"tensors": {"a": ONE | {"shape": [1 << 20]}}}, "do not fit"),
        ({"tensors": {"a": ONE | {"shape": [-3]}}}, "do not fit"),
        ({"tensors": {"a": ONE | {"offset": 4}}}, "do not fit"),
        ({"tensors": {"a": ONE | {"dtype": "F99"}}}, "does not describe weights"),
        ({"tensors": [3]}, "does not describe weights"),
    ],
)
def test_a_description_that_does_not_hold_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    path = tmp_path / f"weights{SUFFIX}"
    path.write_text(json.dumps(GOOD | changes))
    with pytest.raises(FailedPreconditionError, match=words), opened_tensors(path):
        pass
