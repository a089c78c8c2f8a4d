"""The folder in memory that the processes of a run share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from steersman.local.memory import memory_folder


def test_it_is_there_for_its_owner_and_gone_afterwards(tmp_path: Path) -> None:
    with memory_folder(1000, tmp_path) as first, memory_folder(1000, tmp_path) as second:
        assert first is not None
        assert second is not None
        assert first != second
        (first / "weights").write_bytes(b"x")
        assert first.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_owner_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = """
import sys, time, pathlib
from steersman.local.memory import memory_folder
with memory_folder(1000, pathlib.Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(b"x")
    print("ready", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        (left,) = tmp_path.iterdir()
        with memory_folder(1000, tmp_path):
            assert left.is_dir()  # its owner lives
        os.kill(owner.pid, signal.SIGKILL)
    assert left.is_dir()
    with memory_folder(1000, tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_without_room_or_memory_there_is_none(tmp_path: Path) -> None:
    with memory_folder(1 << 60, tmp_path) as folder:
        assert folder is None
    with memory_folder(1, tmp_path / "missing") as folder:
        assert folder is None
