"""Folders appear whole or not at all, and a full disk is said in one sentence."""

from __future__ import annotations

import errno
import os

import pytest

from steersman.artifacts import atomic_dir, manifest_of_hashes, storage_errors, verify
from steersman.errors import ChecksumError, NotFoundError, StorageError


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_appears_complete_under_its_name(tmp_path):
    final = tmp_path / "deep" / "model"
    with atomic_dir(final) as partial:
        (partial / "a.txt").write_text("a")
        assert not final.exists()
        assert partial.parent == final.parent
    assert (final / "a.txt").read_text() == "a"
    assert entries(final.parent) == ["model"]


def write_half(final):
    with atomic_dir(final) as partial:
        (partial / "half").write_text("half")
        raise ValueError("broken")


def fill_the_disk(final):
    with atomic_dir(final) as partial:
        (partial / "part").write_bytes(b"x" * 4096)
        with open("/dev/full", "wb") as full:
            full.write(b"x" * 65536)


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="broken"):
        write_half(tmp_path / "model")
    assert entries(tmp_path) == []


def test_a_failed_replacement_keeps_what_was_there(tmp_path):
    final = tmp_path / "model"
    with atomic_dir(final) as partial:
        (partial / "old").write_text("old")
    with pytest.raises(ValueError, match="broken"):
        write_half(final)
    assert entries(final) == ["old"]
    with atomic_dir(final) as partial:
        (partial / "new").write_text("new")
    assert entries(final) == ["new"]
    assert entries(tmp_path) == ["model"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    leftover = tmp_path / ".model.partial-dead"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with atomic_dir(tmp_path / "model"):
        pass
    assert entries(tmp_path) == ["model"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_sentence(tmp_path):
    message = r"disk full while saving .*model: free at least \d+ MiB or set spec"
    with pytest.raises(StorageError, match=message) as info:
        fill_the_disk(tmp_path / "model")
    assert entries(tmp_path) == []
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
    ids=["disk", "quota", "safetensors"],
)
def test_every_way_of_saying_full_is_understood(tmp_path, error):
    with pytest.raises(StorageError), storage_errors(tmp_path / "model"):
        raise error


def test_other_errors_pass(tmp_path):
    with pytest.raises(PermissionError), storage_errors(tmp_path / "model"):
        raise PermissionError(errno.EACCES, "no")


def test_hashes_find_what_changed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("b")
    (tmp_path / "a").write_text("")
    hashes = manifest_of_hashes(tmp_path)
    assert list(hashes) == ["a", "sub/b"]
    assert hashes["a"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "further").write_text("is not looked at")
    verify(tmp_path, hashes)
    (tmp_path / "a").write_text("changed")
    with pytest.raises(ChecksumError, match="has changed"):
        verify(tmp_path, hashes)
    (tmp_path / "a").unlink()
    with pytest.raises(NotFoundError, match="is missing"):
        verify(tmp_path, hashes)
