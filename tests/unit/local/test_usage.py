"""Seconds and memory of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from steersman.local.usage import Usage, tree_memory


def test_seconds_add_up_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    with Usage(path, interval=0.01) as usage, usage.phase("sft"):
        pass
    usage.seconds["sft"] = 5.0
    usage._save()
    with Usage(path) as again:
        with again.phase("sft"), again.phase("inner"):
            pass
        assert again.seconds["sft"] >= 5.0
        again.forget("sft")
    assert list(Usage(path).seconds) == ["inner"]


def test_memory_counts_children() -> None:
    before = tree_memory()
    program = "held = bytearray(64 * 2**20); print(len(held), flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert tree_memory() - before > 48 * 2**20
        child.communicate(b"\n")
