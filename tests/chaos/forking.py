"""Processes that begin by fork of one that has loaded the libraries.

A run is eight processes, each of which loads torch for seconds; by fork a whole schedule takes seconds. What is under
test are processes as ever: each with its own number, group, memory, signals, and a parent that it dies with.

    harness ── fork ──> steersman run ── fork ──> nursery (loaded, no threads)
                             ^                        └── fork ──> middle (ends) ── fork ──> service or stage
                             └───────────── becomes the parent of the process (PR_SET_CHILD_SUBREAPER)

`CHAOS_COLD=1` begins everything by exec, as people do.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COLD = bool(os.environ.get("CHAOS_COLD"))
_PR_SET_CHILD_SUBREAPER, _PR_SET_NAME = 36, 15
Prepare = Callable[[], None]


def adopt_orphans() -> None:
    """What the descendants of this process leave behind becomes its own child, where it is found."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def preload(family: str) -> None:
    """Loads what the processes of a family import; starts no thread."""
    from steersman.openmp import prefer_yielding_threads

    prefer_yielding_threads()
    import steersman.cli  # noqa: F401

    _import("services.policy.build", "services.policy.servicer", "services.policy.weights", "steersman.rpc.app")
    _import("services.policy.engines.transformers_engine", "transformers.models.llama.modeling_llama")
    _import("trl.chat_template_utils", "steersman.nn.prepare", "numba", "sqlite3", "alembic.command", "mako.template")
    if family == "run":
        _import("peft", "services.reward.servicer", "services.reference.servicer", "training.stage")
        _import("training.online.rl_stage", "training.rejection_sampling", "training.release")
        _import("training.offline.sft", "training.offline.reward_model", "steersman.local.executor")
        _import("steersman.local.prepare")
        if os.environ.get("STEERSMAN_TRACKING") != "off":
            _import("steersman.tracking.follow", "mlflow.tracking", "mlflow.store.tracking")
            _import("mlflow.store.tracking.sqlalchemy_store")
    else:
        _import("services.gateway.server", "services.gateway.testing", "steersman.testing.fake_policy", "psycopg")
        _import("uvloop", "httpx")
    gc.collect()
    gc.freeze()  # no process of ours looks through all this again
    if threading.active_count() > 1:
        raise RuntimeError("a library began a thread; whoever forks must have none")


def _import(*names: str) -> None:
    for name in names:
        __import__(name)


class Child:
    """A process that was forked, with the part of `subprocess.Popen` that is used."""

    def __init__(self, pid: int, module: str) -> None:
        self.pid = pid
        self.module = module
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self._reap(os.WNOHANG)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.module, timeout or 0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def _reap(self, how: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, how)
        except ChildProcessError:
            pid, status = self.pid, 0
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = Child | subprocess.Popen[bytes]


def start(
    module: str,
    arguments: Sequence[str],
    *,
    out: int | Path,
    errors: Path,
    environment: Mapping[str, str],
    prepare: Prepare | None = None,
    nursery: bool = False,
    cold: bool = COLD,
) -> Process:
    """Starts `python -m module` in a group of its own.

    Args:
        out: file, or descriptor, of standard output.
        prepare: called in the new process first, for example to set limits.
        nursery: its own children begin by fork, too (only `steersman`).
        cold: by exec.
    """
    with errors.open("ab") as error_file:
        stdout = out if isinstance(out, int) else os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            if cold:
                return subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    stdin=subprocess.DEVNULL, stdout=stdout, stderr=error_file, env=dict(environment), cwd=ROOT,
                    process_group=0, preexec_fn=prepare,
                )  # fmt: skip
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                _become(module, arguments, stdout, error_file.fileno(), environment, parent, prepare, nursery)
            return Child(pid, module)
        finally:
            if not isinstance(out, int):
                os.close(stdout)


def call(function: Callable[[], Any]) -> int:
    """Calls a function in a process of its own, so that this one stays without threads; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        _forget_parent()
        _leave(function)
    return Child(pid, function.__name__).wait()


def call_for(function: Callable[[], Any]) -> Any:
    """The same for a function that returns something that JSON can hold."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _forget_parent()

        def work() -> None:
            with os.fdopen(write, "w") as pipe:
                json.dump(function(), pipe)

        _leave(work)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    Child(pid, "call").wait()
    return json.loads(text)


def _become(
    module: str,
    arguments: Sequence[str],
    out: int,
    errors: int,
    environment: Mapping[str, str],
    parent: int,
    prepare: Prepare | None,
    nursery: bool,
) -> None:
    """The rest of this process's life, after its fork."""
    from steersman.local.child import die_with_parent

    def work() -> None:
        _forget_parent()
        os.setpgid(0, 0)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (errors, 2)):
            os.dup2(source, target)
        _close_from(3)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(ROOT)
        die_with_parent(parent)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, module.encode()[:15], 0, 0, 0)
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # where a process hangs
        if prepare is not None:
            prepare()
        if nursery:
            _open_nursery()
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    _leave(work)


def _forget_parent() -> None:
    """What the parent would do at its end is not this process's."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _close_from(first: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= first:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _leave(work: Callable[[], Any]) -> None:
    """Works, and ends the process as the interpreter would."""
    code: Any = 0
    try:
        work()
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit((code or 0) & 255)


# -- the nursery ----------------------------------------------------------------------------------------------------


def _open_nursery() -> None:
    """From now on `steersman.local.process.start` asks a loaded process to fork; this one becomes the parent."""
    from steersman.local import nursery, process

    adopt_orphans()
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner = os.getpid()
    if os.fork() == 0:
        mine.close()
        _leave(lambda: _nurse(theirs, owner))
    theirs.close()

    def start(
        module: str, arguments: Sequence[str], log: Path, environment: dict[str, str], *, own_output: bool
    ) -> Child | subprocess.Popen[bytes]:
        if module == "training.ranks":  # torchrun starts its ranks by exec
            return by_exec(module, arguments, log, environment, own_output=own_output)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("ab").close()
        ask = {"module": module, "arguments": list(arguments), "log": str(log), "own": own_output}
        mine.send(json.dumps(ask | {"environment": dict(environment)}).encode())
        return Child(int(mine.recv(64)), module)

    by_exec = process.start
    process.start = start  # type: ignore[assignment]
    nursery.opened = lambda *_: contextlib.nullcontext(start)  # type: ignore[assignment]


def _nurse(orders: socket.socket, owner: int) -> None:
    from steersman.local.child import die_with_parent

    atexit._clear()
    die_with_parent(owner)
    while order := orders.recv(1 << 20):
        asked = json.loads(order)
        middle = os.fork()
        if middle == 0:
            if os.fork() == 0:
                while os.getppid() != owner:  # until the middle has ended
                    time.sleep(0.001)
                os.setpgid(0, 0)
                orders.send(str(os.getpid()).encode())
                orders.close()
                log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND)
                out = log if asked["own"] else os.dup(1)
                _become(asked["module"], asked["arguments"], out, log, asked["environment"], owner, None, False)
            os._exit(0)
        os.waitpid(middle, 0)


# -- the clock and the disk -----------------------------------------------------------------------------------------


def _compile(source: str, library: Path) -> bool:
    """Whether a library that is preloaded could be made; not where there is no C compiler."""
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(Path(__file__).with_name(source)), "-ldl"]
    return shutil.which("cc") is not None and subprocess.run(command, check=False).returncode == 0


def _preloaded(library: Path) -> str:
    """Before what is preloaded anyway."""
    return " ".join([str(library), *os.environ.get("LD_PRELOAD", "").split()])


class Clock:
    """The wall clock of processes that are started by exec; where there is no C compiler there is none."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self._library = folder / "clock.so"
        self.set(0)
        self.works = _compile("clock.c", self._library)

    def set(self, seconds: int) -> None:
        """How far the clock is off, from now on."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("@l", seconds))

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": _preloaded(self._library), "CHAOS_CLOCK": str(self._file)}


class Disk:
    """Below one folder, for all processes that descend from this one, whether by fork or by exec."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def slow(self, folder: Path, milliseconds: int) -> None:
        """A sync takes so long from now on, a write an eighth of it; 0: as ever."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("@l", milliseconds))
            if milliseconds:
                file.write(os.fsencode(folder.resolve()).ljust(_DISK_BYTES - 8, b"\0"))

    def usual(self) -> None:
        self.slow(Path("/"), 0)

    def close(self) -> None:
        shutil.rmtree(self._file.parent, ignore_errors=True)


_DISK_BYTES = 4096


def make_disk(folder: Path) -> dict[str, str] | None:
    """The environment of processes whose disk may be slow; None where the library cannot be made."""
    if not _compile("disk.c", folder / "disk.so"):
        return None
    (folder / "disk").write_bytes(bytes(_DISK_BYTES))
    return {"LD_PRELOAD": _preloaded(folder / "disk.so"), "CHAOS_DISK": str(folder / "disk")}


def find_disk() -> Disk | None:
    """Begins this program anew where it was begun without the library."""
    if "CHAOS_DISK" in os.environ:
        return Disk(Path(os.environ["CHAOS_DISK"]))
    folder = Path(tempfile.mkdtemp(prefix="steersman-chaos-disk-", dir="/tmp"))
    folder.chmod(0o755)  # PostgreSQL's processes are another user's
    more = make_disk(folder)
    if more is not None:
        os.execve(sys.executable, [sys.executable, "-m", "chaos", *sys.argv[1:]], os.environ | more)
    shutil.rmtree(folder)
    return None
