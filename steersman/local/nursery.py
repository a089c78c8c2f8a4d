"""Processes of a run that begin by fork of one that has loaded the libraries.

A run is some ten processes, each of which would load torch, transformers, peft and TRL, for five to nine seconds of
processor time. One process loads them, the others begin as its copies within milliseconds, and memory holds them once.

    steersman run ── exec ──> nursery (loaded, one thread) ── fork ──> service or stage
                  <── socket: start this, does it still run? ──>

Each is a process as ever, with its own number, group, command line, environment and log. It dies with the nursery, and
the nursery with the run. Where there is none (another system than Linux), and should the nursery end, everything begins
by exec; so does a process of a nursery in which a library has initialised CUDA, which no copy of it could use.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steersman import loading
from steersman.local import process
from steersman.local.child import die_with_parent

_ROOM = 4096
"""Bytes of a command line, of which a process of the nursery has as many as the nursery itself."""
_ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


class Forked:
    """A process of the nursery, with the part of `subprocess.Popen` that is used."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                self.returncode = self._nursery.ask({"poll": self.pid})
            except OSError:
                self.returncode = -signal.SIGKILL  # with the nursery
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(0.02)
        return code


class Nursery:
    """Begins with the first process that is wanted of it."""

    def __init__(self, modules: Sequence[str], log: Path) -> None:
        """Args:
        modules: what it loads; one that cannot be loaded is left to the process that needs it.
        log: file that its own standard error is appended to.
        """
        self._modules = modules
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0

    def start(
        self, module: str, arguments: Sequence[str], log: Path, environment: dict[str, str], *, own_output: bool
    ) -> process.Child:
        """As `process.start` does it."""
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("ab").close()
        order = {"module": module, "arguments": list(arguments), "log": str(log), "own_output": own_output}
        try:
            if self._process is None:
                self._begin(environment)
            return Forked(self, self.ask(order | {"environment": environment}))
        except OSError:
            return process.start(module, arguments, log, environment, own_output=own_output)

    def ask(self, order: Mapping[str, Any]) -> Any:
        """The nursery's answer; raises OSError where it has ended."""
        self._asked += 1
        self._orders.write(json.dumps({"number": self._asked, **order}).encode() + b"\n")
        self._orders.flush()
        while line := self._orders.readline():
            number, answer = json.loads(line)
            if number == self._asked:  # an answer that nobody waited for belongs to a question that was interrupted
                return answer
        raise ConnectionError("the nursery has ended")

    def _begin(self, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-m",
            "steersman.local.nursery",
            str(os.getpid()),
            str(theirs.fileno()),
            ",".join(self._modules),
        ]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, " " * _ROOM],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=environment,
                process_group=0,
                pass_fds=[theirs.fileno()],
            )
        self._orders = ours.makefile("rwb")
        ours.close()

    def close(self) -> None:
        """Ends it, and what of it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                self._orders.close()


@contextlib.contextmanager
def opened(modules: Sequence[str], log: Path) -> Iterator[process.Start]:
    """How processes are to be started inside of the block."""
    if sys.platform != "linux":
        yield process.start
        return
    nursery = Nursery(modules, log)
    try:
        yield nursery.start
    finally:
        nursery.close()


def main() -> None:
    parent, orders, modules = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
    die_with_parent(parent)
    ending = _Ending()
    atexit.register(ending.leave)  # the first to be registered is the last to be called
    _show([sys.executable, "-m", "steersman.local.nursery"])
    _load(modules)
    order = _serve(socket.socket(fileno=orders))
    if order is not None:  # this is a process that was asked for
        if _has_initialised_cuda():
            os.execv(sys.executable, [sys.executable, "-m", order["module"], *order["arguments"]])
        sys.argv = [order["module"], *order["arguments"]]
        with ending:
            runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


class _Ending:
    """Ends a process without taking thousands of modules apart, for which it would have to copy all that it shares."""

    def __init__(self) -> None:
        self.code: int | None = None
        """None: not an orderly end."""

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            self.code = 0
        elif isinstance(error, SystemExit) and isinstance(error.code, int | None):
            self.code = error.code or 0

    def leave(self) -> None:
        if self.code is not None:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(self.code & 255)


def _load(modules: Sequence[str]) -> None:
    from steersman.openmp import prefer_yielding_threads

    loading.begin()
    prefer_yielding_threads()
    # What asks for a device while it is imported is answered without initialising the driver (torch's own way).
    os.environ[_ASK_NVML] = "1"
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)
    del os.environ[_ASK_NVML]
    loading.done()  # a collection would also write to all pages that are shared


def _serve(orders: socket.socket) -> dict[str, Any] | None:
    """Answers until the run ends; in a process that was asked for it returns what that is to do."""
    nursery, began_with = os.getpid(), set(os.environ)
    codes: dict[int, int] = {}
    with orders, orders.makefile("rwb") as stream:
        while line := stream.readline():
            order = json.loads(line)
            if "poll" in order:
                if order["poll"] not in codes:
                    pid, status = os.waitpid(order["poll"], os.WNOHANG)
                    if pid:
                        codes[pid] = os.waitstatus_to_exitcode(status)
                answer = codes.get(order["poll"])
            else:
                answer = os.fork()
                if answer == 0:
                    break
                with contextlib.suppress(OSError):
                    os.setpgid(answer, answer)  # before the run may signal it
            stream.write(json.dumps([order["number"], answer]).encode() + b"\n")
            stream.flush()
        else:
            return None
    _settle(order, nursery, began_with)
    return dict(order)


def _settle(order: Mapping[str, Any], nursery: int, began_with: set[str]) -> None:
    """Makes a copy of the nursery a process of its own."""
    die_with_parent(nursery)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    for target in (1, 2) if order["own_output"] else (2,):
        os.dup2(log, target)
    os.close(log)
    for name in began_with - order["environment"].keys():
        del os.environ[name]
    os.environ.update(order["environment"])
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # its global numbers would be those of every other process
    _show([sys.executable, "-m", order["module"], *order["arguments"]])


def _has_initialised_cuda() -> bool:
    """Whether the nursery has: asked in its copy, whom torch would refuse every use of a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda._is_in_bad_fork()


def _show(words: Sequence[str]) -> None:
    """Makes this the command line that `ps` shows: the kernel reads it where the process found its arguments."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, see proc_pid_stat(5)
    line = "\0".join(words).encode()[: end - begin - 1]
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, line, len(line))


if __name__ == "__main__":
    main()
