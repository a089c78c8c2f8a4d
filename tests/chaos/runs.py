"""The run under faults: SFT to release, PPO and rejection sampling, one and two ranks.

A schedule is drawn from its seed: a shape, and for one or two starts of `steersman run` a few faults, each at a step of
a stage. After every end the machine is mended and the run is started again, as its sentence says, until it is
complete. Then weights and rows are compared with those of the unbroken run.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from chaos import forking
from chaos.forking import Process
from chaos.outcome import SLOW_DISK, Bad, Ended, orphans, slow_disk
from chaos.proxy import Proxy

SECONDS = 300.0
"""A start of a run that takes longer hangs, unless the unbroken run took more than a tenth of it."""
STARTS = 6
GENERATION = {"maxNewTokens": 6}
SCORER = """
import json, os, time
from pathlib import Path
PLAN, GIVEN = Path(__file__).with_name("plan.json"), Path(__file__).with_name("given.jsonl")

def score(completions, **kwargs):
    values = [len(c[0]["content"]) % 7 / 7 for c in completions]
    plan = json.loads(PLAN.read_text()) if PLAN.exists() else {}
    if plan.get("calls", 0):
        PLAN.write_text(json.dumps({**plan, "calls": plan["calls"] - 1}))
        what = plan["what"]
        if what == "raise":
            raise RuntimeError("the scorer was told to fail")
        if what == "slow":
            time.sleep(1.0)
        if what == "short":
            values = values[:-1]
        if what in ("nan", "inf"):
            values[0] = float(what)
    with GIVEN.open("a") as file:
        file.write(json.dumps(values) + "\\n")
    return values
"""
SUPERVISED = {"maxSteps": 2, "batchSize": 4, "microBatchSize": 4}
REWARD = {"verifiable": [{"name": "own", "python": "scorer.py:score"}]}
PPO = {
    "rl": {
        "steps": 4,
        "promptsPerStep": 2,
        "samplesPerPrompt": 2,
        "generation": GENERATION,
        "deterministic": True,
        "maxFailedShare": 0.0,
        "reward": REWARD,
    }
}
REJECTION = {
    "rejectionSampling": {
        "rounds": 2,
        "promptsPerRound": 4,
        "samplesPerPrompt": 2,
        "generation": GENERATION,
        "maxFailedShare": 0.0,
        "reward": REWARD,
        "batchSize": 4,
        "microBatchSize": 4,
    }
}
SHAPES = ("ppo", "ppo", "ppo", "given", "given", "rejection", "whole", "ranks")
"""As often as they are drawn. `given`: the services are another machine's, behind proxies."""
_WHOLE = ("ppo", "ranks")
"""Unbroken runs of which every stage is made: two ranks sum in another order than one."""
_OF_THIS_START = ("seconds", "tokens_per", "runtime", "per_second", "_time", "weights_version")
"""What rows hold of the clock, and of services that count their publications from their own beginning."""


def manifest_of(shape: str, base: Path) -> dict[str, Any]:
    last = REJECTION if shape == "rejection" else PPO
    spec: dict[str, Any] = {
        "seed": 5,
        "model": {"base": str(base), "precision": "fp32", "device": "cpu", "threads": 1},
        "data": {"demo": {"demonstrations": 16, "preferences": 16, "prompts": 8, "heldoutPrompts": 8}},
        "services": {"startTimeoutSeconds": 60},
        "stages": [{"sft": SUPERVISED}, {"rewardModel": SUPERVISED}, last, {"release": {}}],
    }
    if shape == "ranks":
        spec["trainer"] = {"workers": 2}
    return {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "chaos"},
        "spec": spec,
    }


# -- one start of a run ---------------------------------------------------------------------------------------------


class Start:
    """`steersman run` at work."""

    def __init__(
        self,
        folder: Path,
        *,
        prepare: Callable[[], None] | None = None,
        force: bool = False,
        clock: forking.Clock | None = None,
    ) -> None:
        """`clock`: another wall clock; it is started by exec then."""
        self.folder = folder
        self.errors = folder / "errors"
        self.errors.write_text("")
        self._pipe, write = os.pipe()
        self._lines = b""
        scratch = folder / "tmp"
        scratch.mkdir(exist_ok=True)
        environment = os.environ | {"STEERSMAN_PROGRESS": "json", "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)}
        if clock is not None:
            environment |= clock.environment
        arguments = ["run", "-f", str(folder / "run.yaml"), "--run-dir", str(folder / "run")]
        self.process: Process = forking.start(
            "steersman", [*arguments, *(["--force-restart"] if force else [])],
            out=write, errors=self.errors, environment=environment, prepare=prepare, nursery=True,
            cold=forking.COLD or clock is not None,
        )  # fmt: skip
        os.close(write)
        self.killed = False
        """By us, so it says nothing."""

    def events(self, seconds: float = 6 * SECONDS) -> Iterator[dict[str, Any] | None]:
        """Events as they come, and None now and then; ends with the process. Raises Bad when it takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self._pipe], [], [], 0.1)
            if ready:
                data = os.read(self._pipe, 65536)
                if not data:
                    break
                *lines, self._lines = (self._lines + data).split(b"\n")
                for line in lines:
                    with contextlib.suppress(ValueError):
                        yield json.loads(line)
            elif self.process.poll() is not None:
                break
            yield None
        else:
            self.end()
            raise Bad(f"the run hangs: no end after {seconds:.0f} s")

    def members(self, module: str) -> list[psutil.Process]:
        """Its processes of a module; `executor` is the run itself."""
        if module == "executor":
            return [psutil.Process(self.process.pid)]
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.name() == module[:15] or module in child.cmdline():
                    found.append(child)
        return sorted(found, key=lambda child: child.pid)

    def wait(self) -> Ended:
        code = self.process.wait(30)
        os.close(self._pipe)
        return Ended(code, self.errors.read_text(), self.killed)

    def end(self) -> None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.resume()
        self.process.kill()
        self.process.wait(30)


# -- faults ---------------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What happens at a step of a stage."""

    name: str
    stage: str
    step: int
    """0: as soon as the stage is heard of."""
    options: dict[str, Any] = field(default_factory=dict)
    done: bool = False


@dataclass
class World:
    """What a schedule can reach: the run's folder, the services given to it, and what is to be mended."""

    folder: Path
    shape: str
    draw: random.Random
    start: Start | None = None
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    mends: list[Callable[[], None]] = field(default_factory=list)
    given: Given | None = None
    clock: forking.Clock | None = None
    disk: forking.Disk | None = None
    force: bool = False
    """The next start is told to make again what does not fit."""
    seconds: float = SECONDS
    """A start that takes longer hangs."""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        self.later.append((time.monotonic() + seconds, work))

    def tick(self, *, all_now: bool = False) -> None:
        due = [entry for entry in self.later if all_now or entry[0] <= time.monotonic()]
        self.later = [entry for entry in self.later if entry not in due]
        for _, work in due:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                work()

    def mend(self) -> None:
        self.tick(all_now=True)
        while self.mends:
            self.mends.pop()()
        (self.folder.parent / "plan.json").unlink(missing_ok=True)
        if self.given is not None:
            self.given.mend()


PROCESSES = ("executor", "training.stage", "services.policy", "services.reward", "services.reference")


def _victims(world: World, module: str) -> list[psutil.Process]:
    assert world.start is not None
    if world.given is not None and module.startswith("services."):
        return [psutil.Process(child.pid) for child in world.given.processes(module)]
    return world.start.members(module)


def _kill(world: World, fault: Fault) -> None:
    module, number = fault.options["process"], fault.options["signal"]
    for victim in _victims(world, module)[: 1 if number != signal.SIGSTOP else None]:
        with contextlib.suppress(psutil.Error):
            victim.send_signal(number)
            if number == signal.SIGSTOP:
                world.after(fault.options["seconds"], victim.resume)
    assert world.start is not None
    if module == "executor" and number == signal.SIGKILL:
        world.start.killed = True


def _scorer(world: World, fault: Fault) -> None:
    plan = {"what": fault.options["what"], "calls": fault.options["calls"]}
    (world.folder.parent / "plan.json").write_text(json.dumps(plan))


def _connection(world: World, fault: Fault) -> None:
    assert world.given is not None
    proxy = world.given.proxies[fault.options["proxy"] % len(world.given.proxies)]
    proxy.set(fault.options["mode"], **fault.options["how"])
    world.after(fault.options["seconds"], lambda: proxy.set("pass"))


def _two_runs(world: World, fault: Fault) -> None:
    """A second one on the same folder is refused and does no harm."""
    out, errors = world.folder / "second.out", world.folder / "second.errors"
    errors.write_text("")
    second = forking.start(
        "steersman", ["run", "-f", str(world.folder / "run.yaml"), "--run-dir", str(world.run)],
        out=out, errors=errors, environment=os.environ, nursery=True,
    )  # fmt: skip
    code = second.wait(world.seconds)
    ended = Ended(code, errors.read_text(), False)
    assert world.start is not None
    if code:
        ended.check()
    elif world.start.process.poll() is None:
        raise Bad("a second run worked on the same folder")


def _read_only(world: World, fault: Fault) -> None:
    if _remount(world, "ro"):
        world.mends.append(lambda: _remount(world, "rw"))


def _full(world: World, fault: Fault) -> None:
    """Somebody else fills the disk."""
    if not os.path.ismount(world.run):
        return
    junk = world.run / ".junk"
    with contextlib.suppress(OSError), junk.open("wb") as file:
        while True:
            file.write(b"x" * 65536)
            file.flush()
    world.mends.append(lambda: junk.unlink(missing_ok=True))


def _slow(world: World, fault: Fault) -> None:
    disk = world.disk
    assert disk is not None
    disk.slow(world.run, fault.options["milliseconds"])
    world.after(fault.options["seconds"], disk.usual)


def _remount(world: World, how: str) -> bool:
    command = ["mount", "-o", f"remount,{how}", str(world.run)]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode == 0


def _no_artifacts(world: World, fault: Fault) -> None:
    """The folder that weights go through is away."""
    path = world.run / "services" / "policy-0.yaml"
    with contextlib.suppress(OSError, KeyError, ValueError):
        url = yaml.safe_load(path.read_text())["artifactUrls"][0]
        shutil.rmtree(url.removeprefix("file://"), ignore_errors=True)


def _stale(world: World, fault: Fault) -> None:
    """A replica that begins anew has the weights of the beginning."""
    assert world.given is not None
    world.given.restart("services.policy", fault.options["index"])


FAULTS: dict[str, Callable[[World, Fault], None]] = {
    "signal": _kill,
    "scorer": _scorer,
    "connection": _connection,
    "two runs": _two_runs,
    "read-only disk": _read_only,
    "full disk": _full,
    SLOW_DISK: _slow,
    "artifacts away": _no_artifacts,
    "stale replica": _stale,
}


# -- between two starts ---------------------------------------------------------------------------------------------


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))


def _cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))] if data else b"")


CORRUPTED = {
    "checkpoint": "{last}/checkpoints/**/*",
    "adapter": "{last}/adapter/adapter_model.safetensors",
    "model": "sft/model/model.safetensors",
    "reward model": "reward-model/model/*",
    "complete.json": "*/complete.json",
    "metrics": "{last}/metrics.jsonl",
    "prepared.json": "prepared.json",
    "usage.json": "usage.json",
    "manifest.yaml": "manifest.yaml",
}


def corrupt(world: World, what: str) -> str:
    """Damages a file of the kind; returns which, or nothing where there is none."""
    last = "rejection-sampling" if world.shape == "rejection" else "rl"
    found = sorted(path for path in world.run.glob(CORRUPTED[what].format(last=last)) if path.is_file())
    if not found:
        return ""
    path = world.draw.choice(found)
    world.draw.choice((_flip, _cut))(path, world.draw)
    return str(path.relative_to(world.run))


# -- services of another machine ------------------------------------------------------------------------------------


class Given:
    """Two policy replicas, a reward and a reference service, each behind a proxy.

    They are another machine's, and so are their models' files: what is mapped from a file changes with it.
    """

    def __init__(self, folder: Path, run: Path, scorer: Path) -> None:
        self._folder = folder / "given"
        self._folder.mkdir()
        common = {"precision": "fp32", "threads": 1, "device": "cpu", "drainSeconds": 1.0}
        models = {name: str(self._folder / name) for name in ("sft", "reward-model")}
        for name, copy in models.items():
            shutil.copytree(run / name / "model", copy)
        policy = common | {"model": models["sft"]}
        parts = [
            {"name": "preference", "kind": "model", "path": models["reward-model"]},
            {"name": "own", "kind": "verifiable", "python": f"{scorer}:score"},
        ]
        self._configs: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
            ("services.policy", policy, ("port", "weightsPort")),
            ("services.policy", policy, ("port", "weightsPort")),
            ("services.reward", common | {"scorers": parts, "mergeRequests": False}, ("port",)),
            ("services.reference", policy | {"mergeRequests": False}, ("port",)),
        ]
        from steersman.local.process import free_ports

        ports = free_ports(6)
        self.proxies = [Proxy(port) for port in ports]
        self._running: list[Process] = []
        taken = iter(ports)
        for index, (module, config, keys) in enumerate(self._configs):
            config = {**config, **{key: next(taken) for key in keys}}
            (self._folder / f"{index}.yaml").write_text(yaml.safe_dump(config))
            self._running.append(self._start(module, index))

    def _start(self, module: str, index: int) -> Process:
        log = self._folder / f"{index}.log"
        config = str(self._folder / f"{index}.yaml")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        return forking.start(module, ["--config", config], out=log, errors=log, environment=environment)

    def spec(self) -> dict[str, Any]:
        at = [f"127.0.0.1:{proxy.port}" for proxy in self.proxies]
        return {
            "policy": {"endpoints": [at[0], at[2]], "weightsEndpoints": [at[1], at[3]]},
            "reward": {"endpoints": [at[4]]},
            "reference": {"endpoints": [at[5]]},
            "startTimeoutSeconds": 60,
        }

    def processes(self, module: str) -> list[Process]:
        return [p for p, (name, _, _) in zip(self._running, self._configs, strict=True) if name == module]

    def restart(self, module: str, index: int = 0) -> None:
        places = [place for place, (name, _, _) in enumerate(self._configs) if name == module]
        place = places[index % len(places)]
        self._running[place].kill()
        self._running[place].wait()
        self._running[place] = self._start(module, place)

    def tend(self) -> None:
        """Whoever runs them starts again what has ended."""
        for place, process in enumerate(self._running):
            if process.poll() is not None:
                self._running[place] = self._start(self._configs[place][0], place)

    def mend(self) -> None:
        for proxy in self.proxies:
            proxy.set("pass")
        self.tend()

    def close(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()
        for proxy in self.proxies:
            proxy.close()


# -- schedules ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A schedule, drawn from its seed alone."""

    shape: str
    faults: list[Fault]
    between: list[str]
    """What is damaged after the first end."""
    limits: str
    """Of the first start: few handles, small files, full shared memory, a clock that jumps, or nothing."""
    edited: bool
    """The manifest is another one at the second start."""

    def names(self) -> list[str]:
        found = [_name(fault) for fault in self.faults] + [f"damaged {what}" for what in self.between]
        return found + ([self.limits] if self.limits else []) + (["manifest edited"] if self.edited else [])


def _name(fault: Fault) -> str:
    options = fault.options
    if fault.name == "signal":
        return f"{options['signal'].name} {options['process']}"
    if fault.name == "scorer":
        return f"scorer: {options['what']}"
    return f"connection: {options['mode']}" if fault.name == "connection" else fault.name


def plan_of(seed: int, *, mounts: bool, jumps: bool, disk: bool = True, shape: str | None = None) -> Plan:
    draw = random.Random(seed)
    shape = shape or draw.choice(SHAPES)
    last = "rejection-sampling" if shape == "rejection" else "rl"
    stages = [(last, 4 if last == "rl" else 2)] * 4 + [("release", 0)]
    if shape == "whole":
        stages += [("sft", 2), ("reward-model", 2), ("prepare", 0)]
    names = ["signal"] * 5 + ["scorer"] * 2 + ["two runs", "artifacts away"]
    names += ["read-only disk", "full disk"] if mounts else []
    names += ["connection"] * 5 + ["stale replica"] * 2 if shape == "given" else []
    faults = [_drawn(draw.choice(names), *draw.choice(stages), draw, last) for _ in range(draw.choice((1, 1, 2, 3)))]
    between: list[str] = []
    if draw.random() < 0.35:
        # Something has to end the first start.
        between = [draw.choice(list(CORRUPTED))]
        ends = {"process": draw.choice(("executor", "training.stage")), "signal": signal.SIGKILL}
        faults.append(Fault("signal", last, draw.randint(1, 2), ends))
    limits = draw.choice(("few handles", "small files", "full shared memory")) if draw.random() < 0.15 else ""
    if not limits and jumps and draw.random() < 0.02:
        limits = "clock jumps"
    if disk and (slow := slow_disk(seed)) is not None:
        stage, steps = slow.choice(stages)
        how = {"milliseconds": slow.randint(20, 800), "seconds": slow.uniform(1, 6)}
        faults.append(Fault(SLOW_DISK, stage, slow.randint(0, max(0, steps - 1)), how))
    return Plan(shape, faults, between, limits, bool(between) and draw.random() < 0.2)


def _drawn(name: str, stage: str, steps: int, draw: random.Random, last: str) -> Fault:
    step = draw.randint(0, max(0, steps - 1))
    options: dict[str, Any] = {}
    if name == "signal":
        number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM))
        options = {"process": draw.choice(PROCESSES), "signal": number, "seconds": draw.uniform(0.5, 4)}
    elif name == "scorer":
        calls = draw.choice((1, 1, 2, 1000))
        options = {"what": draw.choice(("raise", "nan", "inf", "short", "slow")), "calls": calls}
        if options["what"] == "slow":
            options["calls"] = 2
        stage = last
    elif name == "connection":
        mode = draw.choice(("cut", "delay", "freeze", "half", "flip"))
        how = {"delay": {"seconds": draw.uniform(0.02, 0.3)}, "flip": {"bytes": draw.randrange(20_000)}}.get(mode, {})
        options = {"proxy": draw.randrange(6), "mode": mode, "how": how, "seconds": draw.uniform(0.3, 5)}
        stage = last
    elif name == "stale replica":
        options, stage = {"index": draw.randrange(2)}, last
    return Fault(name, stage, step, options)


@dataclass
class Family:
    """The folders that all schedules share: a base model and the unbroken runs."""

    scratch: Path
    mounts: bool = False
    clock: forking.Clock | None = None
    """None where there is no compiler: it does not jump then."""
    disk: forking.Disk | None = None
    _unbroken: dict[str, dict[str, Any]] = field(default_factory=dict)
    _slowest: float = 0.0
    """Seconds of the slowest unbroken run: a busy machine is given more time."""

    def __post_init__(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        (self.scratch / "scorer.py").write_text(SCORER)
        if forking.call(lambda: _write_base(self.scratch / "base")):
            raise RuntimeError("the base model cannot be written")
        self.mounts = _may_mount(self.scratch / "probe")
        clock = forking.Clock(self.scratch)
        self.clock = clock if clock.works else None

    def unbroken(self, shape: str) -> dict[str, Any]:
        """What the unbroken run of a shape made."""
        kind = {"given": "given", "rejection": "rejection", "ranks": "ranks"}.get(shape, "ppo")
        if kind not in self._unbroken:
            world = self._world(kind, f"unbroken-{kind}", random.Random(0))
            if kind not in _WHOLE and self.unbroken("ppo"):
                self._begin(world)
            try:
                self._give(world)
                began = time.monotonic()
                world.start = Start(world.folder)
                for _ in world.start.events():
                    pass
                ended = world.start.wait()
                self._slowest = max(self._slowest, time.monotonic() - began)
                if ended.code:
                    raise RuntimeError(f"the unbroken run ended with {ended.code}: {ended.errors}")
            finally:
                if world.given is not None:
                    world.given.close()
            self._unbroken[kind] = made_by(world.run)
        return self._unbroken[kind]

    def _world(self, shape: str, name: str, draw: random.Random) -> World:
        folder = self.scratch / name
        folder.mkdir()
        (folder / "scorer.py").symlink_to(self.scratch / "scorer.py")
        (folder / "run.yaml").write_text(yaml.safe_dump(manifest_of(shape, self.scratch / "base")))
        return World(folder, shape, draw)

    def _begin(self, world: World) -> None:
        """What all runs of the shape have in common is there already."""
        done = self.scratch / f"unbroken-{world.shape if world.shape in _WHOLE else 'ppo'}" / "run"
        for name in ("sft", "reward-model", "data"):
            shutil.copytree(done / name, world.run / name)
        shutil.copy(done / "prepared.json", world.run)

    def _give(self, world: World) -> None:
        if world.shape == "given":
            world.given = Given(world.folder, world.run, self.scratch / "scorer.py")
            manifest = manifest_of(world.shape, self.scratch / "base")
            manifest["spec"]["services"] = world.given.spec()
            (world.folder / "run.yaml").write_text(yaml.safe_dump(manifest))

    def schedule(self, seed: int, shape: str | None = None) -> tuple[str, list[str]]:
        """Runs one; returns `equal` or `stopped_clearly`, and its faults.

        Raises Bad when an invariant is broken.
        """
        jumps, disk = self.clock is not None, self.disk is not None
        plan = plan_of(seed, mounts=self.mounts, jumps=jumps, disk=disk, shape=shape)
        expected = self.unbroken(plan.shape)
        world = self._world(plan.shape, f"seed-{seed}", random.Random(seed + 1))
        world.seconds, world.disk = max(SECONDS, 10 * self._slowest), self.disk
        if plan.limits == "clock jumps":
            world.clock = self.clock
        before = set(os.listdir("/dev/shm"))
        mounted = any(fault.name in ("full disk", "read-only disk") for fault in plan.faults)
        world.run.mkdir()
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "chaos", str(world.run)], check=True)
        try:
            if plan.shape != "whole":
                self._begin(world)
            self._give(world)
            stopped = _until_complete(world, plan)
            _compare(expected, made_by(world.run))
        except Bad as bad:
            bad.faults = plan.names()
            raise
        finally:
            world.mend()
            if world.start is not None:
                world.start.end()
            if world.given is not None:
                world.given.close()
            left = orphans()
            if not any(fault.name == "signal" and fault.options["signal"] == signal.SIGKILL for fault in plan.faults):
                left += _temporary(world.folder / "tmp")
            if mounted:
                subprocess.run(["umount", "-l", str(world.run)], check=False)
            if not os.environ.get("CHAOS_KEEP"):
                shutil.rmtree(world.folder, ignore_errors=True)
        _check_left(left, before, plan)
        return "stopped_clearly" if stopped else "equal", plan.names()


def _until_complete(world: World, plan: Plan) -> bool:
    """Starts the run until it is complete; whether it ever stopped by itself, with its sentence."""
    stopped = False
    words: list[str] = []
    for number in range(STARTS):
        first = number == 0
        edited = number == 1 and plan.edited
        if number == 1:
            for what in plan.between:
                corrupt(world, what)
        if edited:
            _edit(world, "1e-3")
        faults = plan.faults if first else []
        limits = plan.limits if first else ""
        clock = world.clock if limits == "clock jumps" else None
        world.start = Start(world.folder, prepare=_limits(limits), force=world.force, clock=clock)
        ended = _follow(world, faults)
        world.mend()
        if edited:
            _edit(world, None)
            # Where the run's own manifest cannot be read any more nothing knows the field: what was begun does not go
            # on, and of what is complete a digest says it. A flipped bit may leave it readable.
            named = ("learningRate", *(("is lost", "settings") if "manifest.yaml" in plan.between else ()))
            if ended.code == 0 or not any(words in ended.errors for words in named):
                raise Bad(f"an edited manifest was not refused by its field: {ended.code} {ended.errors[-300:]}")
        if ended.code == 0:
            if plan.faults and first and any(not fault.done for fault in plan.faults):
                pass  # the step was over before it was heard of
            return stopped
        ended.check()
        told = ended.sentence
        if told and not told.endswith("steersman: stopped"):
            stopped = stopped or not _by_our_hand(told, plan)
        if named := re.search(r"remove (\S+?),? (?:and|to) start", told):
            path = _inside(world.run, Path(named[1]))
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        # The same refusal twice, with everything mended: what is damaged has to be made again.
        world.force = told != "" and words[-1:] == [told]
        words.append(told)
    raise Bad(f"not complete after {STARTS} starts; the last words were: {words[-1][:400]}")


def _inside(run: Path, path: Path) -> Path:
    if run not in path.parents:
        raise Bad(f"a sentence names {path} to be removed, which is not the run's")
    return path


def _by_our_hand(told: str, plan: Plan) -> bool:
    """The trainer that we killed ends the run, which says so."""
    ours = {f.options["process"] for f in plan.faults if f.name == "signal" and f.options["signal"] != signal.SIGSTOP}
    return "training.stage" in ours and ("killed by signal" in told or "143" in told)


def _follow(world: World, faults: list[Fault]) -> Ended:
    assert world.start is not None
    jumps = itertools.cycle((7200, -7200, 40_000_000, 0, -40_000_000))
    for event in world.start.events(world.seconds):
        world.tick()
        if event is not None and world.clock is not None:
            world.clock.set(next(jumps))
        if world.given is not None:
            world.given.tend()
        if event is None:
            continue
        step = event.get("step", 0) if event.get("event") == "progress" else 0
        for fault in faults:
            if not fault.done and fault.stage == event.get("stage") and fault.step <= step:
                fault.done = True
                FAULTS[fault.name](world, fault)
    return world.start.wait()


def _limits(name: str) -> Callable[[], None] | None:
    if name == "few handles":
        return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
    if name == "small files":
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (80 * 1024, 80 * 1024))
    if name == "full shared memory":
        return _small_shared_memory
    return None


def _small_shared_memory() -> None:
    """In a mount namespace of its own, where that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) == 0:  # CLONE_NEWNS
        subprocess.run(["mount", "--make-rprivate", "/"], check=False, capture_output=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "shm", "/dev/shm"], check=False, capture_output=True)


def _edit(world: World, rate: str | None) -> None:
    path = world.folder / "run.yaml"
    manifest = yaml.safe_load(path.read_text())
    sft = manifest["spec"]["stages"][0]["sft"]
    if rate is None:
        sft.pop("optimizer", None)
    else:
        sft["optimizer"] = {"learningRate": float(rate)}
    path.write_text(yaml.safe_dump(manifest))


# -- what must hold -------------------------------------------------------------------------------------------------


def made_by(run: Path) -> dict[str, Any]:
    """Digests of all weights, and the rows without what the clock says."""
    found: dict[str, Any] = {}
    for path in sorted(run.glob("*/complete.json")):
        files = json.loads(path.read_text())["files"]
        found[path.parent.name] = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
    for path in sorted(run.rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[f"{path.parent.relative_to(run)} rows"] = [
            {key: value for key, value in row.items() if not any(word in key for word in _OF_THIS_START)}
            for row in rows
        ]
    return found


def _compare(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in expected.items():
        if found.get(name) == value or (name == "rejection-sampling rows" and _close(value, found.get(name))):
            continue
        if name.endswith("rows") and name in found:
            differing = [
                f"row {number + 1}: {key} {one.get(key)} != {two.get(key)}"
                for number, (one, two) in enumerate(zip(value, found[name], strict=False))
                for key in one.keys() | two.keys()
                if one.get(key) != two.get(key)
            ]
            raise Bad(f"{name}: {len(found[name])} of {len(value)}, {'; '.join(differing[:4])}")
        raise Bad(f"{name} differs from the unbroken run's")


def _close(one: Any, other: Any) -> bool:
    """Rejection sampling promises equal winners, and so weights; its mean rewards may differ in their last digits."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    return bool(one == other)


def _temporary(folder: Path) -> list[str]:
    """Temporary files that processes left which were not killed; caches may stay."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [f"temporary {name}" for name in names if not name.startswith(("torchinductor_", "steersman-0"))]


def _check_left(left: list[str], before: set[str], plan: Plan) -> None:
    if left:
        raise Bad(f"left behind: {left[:5]}", plan.names())
    shared = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("steersman-")}
    owned = {name for name in shared if _is_locked(Path("/dev/shm") / name)}
    # A killed run's folder is the next run's to remove; nobody comes after the last start, unless that was killed.
    if shared - owned:
        raise Bad(f"shared memory is left behind: {sorted(shared - owned)}", plan.names())


def _is_locked(path: Path) -> bool:
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _write_base(folder: Path) -> None:
    from steersman.testing.models import save_model_folder, tiny_llama

    save_model_folder(folder, tiny_llama())


def _may_mount(folder: Path) -> bool:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "chaos", str(folder)], capture_output=True, check=False)
    if done.returncode == 0:
        subprocess.run(["umount", str(folder)], check=False)
    return done.returncode == 0
