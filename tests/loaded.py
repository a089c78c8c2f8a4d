"""Commands that begin by fork of a process that has torch and its friends loaded.

A command and the services that it starts would each load them, for six seconds of processor time. What is under test
are processes as ever, with the nursery that `steersman run` has by itself:

    test ── exec ──> nursery (loaded) ── fork ──> steersman run ── fork ──> its nursery ── fork ──> service or stage

A pytest plugin; `python -m loaded` is the command's first moment.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from steersman.local import executor, nursery, process, serve
from steersman.local.child import die_with_parent
from steersman.local.supervisor import Supervisor

STEERSMAN = str(Path(sys.executable).with_name("steersman"))
MODULES = [
    *("steersman.cli", "steersman.local.architecture", "steersman.nn.prepare", "steersman.nn.load"),
    *("steersman.local.executor", "steersman.local.serve", "steersman.suites", "steersman.testing.models"),
    *("services.policy.build", "services.policy.servicer", "services.policy.weights"),
    *("services.policy.engines.transformers_engine", "services.policy.engines.cpu_layers"),
    *("services.reward.engine", "services.reward.servicer", "services.reference.engine", "services.reference.servicer"),
    *("services.gateway.server", "training.online.rl_stage", "training.evaluate", "training.release"),
    *("training.offline.sft", "training.offline.reward_model", "training.rejection_sampling"),
    *("transformers.models.llama.modeling_llama", "peft", "torch.distributed.run"),
]
"""None that is run as such: `python -m` would load it twice."""


class Command:
    """A command that runs, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, child: process.Child, stdout: IO[str], errors: Path) -> None:
        self._child = child
        self._errors = errors
        self.pid = child.pid
        self.stdout = stdout

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        return self._child.poll()

    @property
    def returncode(self) -> int | None:
        return self._child.returncode

    def wait(self, timeout: float | None = None) -> int:
        return self._child.wait(timeout)

    def communicate(self) -> tuple[str, str]:
        """What it still writes, and its standard error."""
        said = "" if self.stdout.closed else self.stdout.read()
        self.stdout.close()
        self.wait()
        return said, self._errors.read_text()


class Loaded:
    """The process that commands are forked from; it begins with the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._nursery = nursery.Nursery(MODULES, folder / "nursery.log")

    def process(
        self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str], *, own_output: bool
    ) -> process.Child:
        """As `process.start` does it, for services of this process."""
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        ours = {**environment, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        return self._nursery.start(module, arguments, log, ours, own_output=own_output)

    def start(
        self,
        *arguments: str,
        cwd: Path,
        module: str = "steersman",
        environment: Mapping[str, str] = os.environ,
        file_kib: int = 0,
    ) -> Command:
        """`python -m MODULE ARGUMENTS`; file_kib: most that it may write to one file, 0: anything."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        os.mkfifo(folder / "out")
        ours = [str(folder), str(cwd), str(file_kib), module, *arguments]
        child = self.process("loaded", ours, folder / "errors", environment, own_output=False)
        return Command(child, (folder / "out").open(), folder / "errors")

    def close(self) -> None:
        self._nursery.close()

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = self.start(*arguments, **options)
        out, errors = command.communicate()
        return subprocess.CompletedProcess(list(arguments), command.wait(), out, errors)


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    made = Loaded(tmp_path_factory.mktemp("loaded"))
    yield made
    made.close()


class _Next:
    """A nursery that was forked while this process had one thread, for the time when the command asks for one."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._orders.close()
            self._wait_and_become(theirs, parent)
        theirs.close()

    def _wait_and_become(self, orders: socket.socket, parent: int) -> None:
        die_with_parent(parent)
        nursery._show([sys.executable, "-m", "steersman.local.nursery"])
        message, descriptors, _, _ = socket.recv_fds(orders, 1 << 20, 2)
        if not message:
            os._exit(0)
        orders.close()
        log, its_orders = descriptors
        os.dup2(log, 2)
        os.close(log)
        asked = json.loads(message)
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv = ["steersman.local.nursery", str(parent), str(its_orders), asked["modules"]]
        nursery.main()
        raise SystemExit

    def begin(
        self, command: list[str], *, stderr: IO[bytes], env: dict[str, str], pass_fds: list[int], **_: Any
    ) -> Any:
        """As `subprocess.Popen` for `python -m steersman.local.nursery PARENT ORDERS MODULES`."""
        order = {"environment": env, "modules": command[5]}
        os.setpgid(self.pid, self.pid)
        socket.send_fds(self._orders, [json.dumps(order).encode()], [stderr.fileno(), *pass_fds])
        return self

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


def main() -> None:
    folder, cwd, file_kib, module, *arguments = sys.argv[1:]
    for name, target in (("out", 1), ("errors", 2)):
        found = os.open(Path(folder) / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(found, target)
        os.close(found)
    os.chdir(cwd)
    if int(file_kib):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_kib) << 10,) * 2)
    if module == "steersman":
        _fork_its_nurseries(arguments[0], Path(folder))
        nursery._show([sys.executable, STEERSMAN, *arguments])
    else:
        nursery._show([sys.executable, "-m", module, *arguments])
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_its_nurseries(command: str, folder: Path) -> None:
    """So do what it serves and checks; torchrun and its ranks begin by exec."""
    waiting = [_Next() for _ in range(2 if command == "run" else 1)]
    nursery.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=lambda *arguments, **options: waiting.pop().begin(*arguments, **options),
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    own = nursery.Nursery([], folder / "nursery.log")
    serve.Supervisor = functools.partial(Supervisor, start=own.start)  # type: ignore[misc, assignment]
    executor.run_child.__kwdefaults__["start"] = own.start  # of `validate`; a run names its own


if __name__ == "__main__":
    main()
