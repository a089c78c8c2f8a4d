"""Child processes: how they are started, ended and read."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Protocol

GRACE_SECONDS = 8.0
"""From SIGTERM to SIGKILL."""


class Child(Protocol):
    """A process that was started: `subprocess.Popen`, or what has this of it."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Start(Protocol):
    """`start`, or another way to the same."""

    def __call__(
        self, module: str, arguments: Sequence[str], log: Path, environment: dict[str, str], *, own_output: bool
    ) -> Child: ...


def start(
    module: str, arguments: Sequence[str], log: Path, environment: dict[str, str], *, own_output: bool
) -> subprocess.Popen[bytes]:
    """Starts `python -m module` in a process group of its own; it dies with this process.

    Call it from a thread that lives as long as the child may: the kernel watches the thread.

    Args:
        log: file that standard error is appended to.
        own_output: standard output goes to the log as well, instead of to this process's.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "steersman.local.child", str(os.getpid()), module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file if own_output else None,
            stderr=file,
            env=environment,
            process_group=0,
        )


def signal_group(process: Child, number: signal.Signals) -> None:
    """Signals a child and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def stop(processes: Sequence[Child], grace: float = GRACE_SECONDS) -> None:
    """Ends children together: SIGTERM, and after `grace` seconds SIGKILL; also when interrupted while waiting."""
    try:
        for process in processes:
            if process.poll() is None:
                signal_group(process, signal.SIGTERM)
        until = time.monotonic() + grace
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        for process in processes:
            # The group may still have members after its leader has ended.
            signal_group(process, signal.SIGKILL)
            process.wait()


def free_ports(count: int, taken: Container[int] = ()) -> list[int]:
    """Free loopback ports below the range that the kernel gives to outgoing connections.

    So a service that is started again finds its port still free.

    Args:
        count: how many.
        taken: ports that were given away and may not be listened on yet.
    """
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 2_000):
        if len(found) == count:
            break
        if port not in taken and is_free(port):
            found.append(port)
    return found


def is_free(port: int) -> bool:
    """Whether a server could listen on a loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def last_words(log: Path, since: int = 0, begins: tuple[str, ...] = ()) -> str:
    """The last line of a log, in which a program of Steersman says why it failed.

    Args:
        since: offset in bytes at which the program's part of the log begins.
        begins: beginnings of lines that are preferred to what comes after them (torchrun's own words).
    """
    with log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - 8192))
        lines = [line.strip() for line in reversed(file.read().decode(errors="replace").splitlines()) if line.strip()]
    return next((line for line in lines if line.startswith(begins)), lines[0] if lines else "it left no message")


def cause(code: int) -> str:
    """What an exit status means."""
    if code == -signal.SIGKILL:
        return "killed by signal 9, perhaps for want of memory"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def child_environment(threads: int, *, offline: bool, shared: bool = True) -> dict[str, str]:
    """Environment of services and stages.

    Threads that wait must not keep a core that another process needs. Those of `steersman.openmp` give way while they
    spin; GNU's, its stand-in on other machines, must sleep at once, unless the process has the cores for itself.

    Args:
        threads: CPU threads of each process; 0: all cores.
        offline: the base model is on this machine, so no hub is asked.
        shared: other processes compute at the same time.
    """
    count = str(threads or len(os.sched_getaffinity(0)))
    environment = os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if shared:
        environment["OMP_WAIT_POLICY"] = "passive"
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment
