"""The bytes that carry weights."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import psutil
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from steersman.nn import serialize
from steersman.nn.serialize import anonymous_file, digest_of, mapped, mapped_tensors, write_safetensors


def written(tensors: dict[str, torch.Tensor]) -> bytes:
    with anonymous_file() as file:
        write_safetensors(tensors, file)
        with mapped(file) as data:
            return bytes(data)


def test_what_was_written_is_read_where_it_lies(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "parameter": torch.randn(7),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 2),
        "of another type": torch.arange(5),
    }
    path = tmp_path / "weights"
    save_file(tensors, path, {"of": "the library"})
    found = mapped_tensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    found["parameter"].zero_()  # a copy's, not the file's
    assert torch.equal(mapped_tensors(path)["parameter"], tensors["parameter"])


def test_a_service_that_reads_updates_for_ever_does_not_grow(tmp_path: Path) -> None:
    """`load_file` keeps 64 bytes of every tensor (safetensors 0.8.0): 13 MiB of these."""
    path = tmp_path / "weights"
    save_file({str(index): torch.zeros(1) for index in range(400)}, path)
    process, before = psutil.Process(), 0
    for number in range(600):
        mapped_tensors(path)
        if number == 100:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 2 * 2**20


@pytest.mark.parametrize("damage", [b"", b"short", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "weights"
    path.write_bytes(damage)
    with pytest.raises((SafetensorError, OSError)):
        mapped_tensors(path)


def test_safetensors_reads_what_was_written() -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "view": torch.randn(4, 6).T,
        "parameter": torch.nn.Parameter(torch.randn(7)),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 2),
    }
    found = load(written(tensors))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(0, 40), max_size=12), threads=st.integers(1, 4), most=st.integers(1, 50))
def test_every_way_to_share_the_work_writes_the_same(sizes: list[int], threads: int, most: int) -> None:
    """`pwritev` may write less than it was asked to, and each thread writes parts of tensors."""
    tensors = {f"t{index}": torch.randn(size) for index, size in enumerate(sizes)}
    whole = written(tensors)

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        data = b"".join(buffers[:2])[:most]
        return os.pwrite(descriptor, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serialize.os, "pwritev", short)
        patch.setattr(serialize.torch, "get_num_threads", lambda: threads)
        assert written(tensors) == whole


def test_a_smaller_payload_takes_the_place_of_a_larger_one(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with path.open("w+b") as file:
        for size in (100, 3):
            write_safetensors({"x": torch.ones(size)}, file)
            with mapped(path) as data:
                assert load(bytes(data))["x"].shape == (size,)
                assert digest_of(data) == blake3(path.read_bytes()).hexdigest()


def test_no_room() -> None:
    with Path("/dev/full").open("r+b", buffering=0) as file, pytest.raises(OSError) as caught:  # noqa: PT011
        serialize._write(file.fileno(), 0, [memoryview(b"abc")])
    assert caught.value.errno == errno.ENOSPC
