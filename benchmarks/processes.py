"""Processes of Steersman that a benchmark starts, the runs that they execute, and whether they are ready."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steersman.local import process
from steersman.local.process import Child

_READY_SECONDS = 300


def alignment_run(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run, as plain data."""
    return {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": name},
        "spec": spec,
    }


@contextlib.contextmanager
def running(module: str, *arguments: str, log: Path = Path(os.devnull), **environment: str) -> Iterator[Child]:
    """`python -m MODULE ARGUMENTS` while the block runs; it dies with the benchmark."""
    child = process.start(module, arguments, log, os.environ | environment, own_output=True)
    try:
        yield child
    finally:
        process.stop([child], grace=60.0)


def in_own_process(module: str, request: dict[str, Any], threads: int) -> dict[str, Any]:
    """What `python -m MODULE --child REQUEST` prints last, as JSON: its peak of memory is its own."""
    command = [sys.executable, "-m", module, "--child", json.dumps(request)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def until_ready(port: int, *children: Child) -> None:
    """Waits for the gateway on `port`; RuntimeError where it does not come, or one of `children` has ended."""
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if any(child.poll() is not None for child in children):
            raise RuntimeError("a process of the benchmark ended at once")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5)
            return
        time.sleep(0.1)
    raise RuntimeError(f"the gateway is not ready after {_READY_SECONDS} s")


def peak_mib(pid: int | str = "self") -> float:
    """Most memory that a process ever had, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)  # none: a zombie
