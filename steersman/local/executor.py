"""Executes an `AlignmentRun` on this machine: every stage a process, the services it needs beside it.

    prepare -> stage after stage (complete ones are left out, killed ones continue) -> report

<run>/manifest.yaml              the resolved manifest
<run>/prepared.json              base model, device and precision
<run>/data/                      generated data
<run>/<stage>/                   see steersman.config.stages
<run>/services/<name>.yaml|.log  the services' configuration and logs
<run>/logs/<stage>.log           what a stage wrote to standard error
<run>/usage.json                 seconds by phase, peak memory
<run>/report/report.html         the report, where an evaluation has been made
<run>/summary.json               its numbers
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steersman.artifacts import read_json
from steersman.config.manifest import AlignmentRun, ServicesSpec
from steersman.errors import ChecksumError, ConfigError, ConflictError, StorageError, UnavailableError
from steersman.home import cache_folder
from steersman.local import folder, nursery, process
from steersman.local.evaluations import check_evaluations
from steersman.local.memory import memory_folder
from steersman.local.pace import Pace
from steersman.local.prepare import found_digests
from steersman.local.services import GRPC_NAMES, endpoint_overrides, services_of
from steersman.local.supervisor import Supervisor
from steersman.local.takeover import source_folder, take_over
from steersman.local.tracked import SWITCH, followed
from steersman.local.usage import Usage
from steersman.progress import AFTERWARDS, ConsoleReporter, clock, say
from steersman.rpc.client import Access, wait_ready
from steersman.rpc.token import RUN_TOKEN


class StageFailed(Exception):
    """A child process ended with an error, which is the message."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_manifest(run: AlignmentRun, run_dir: Path, *, force_restart: bool = False) -> AlignmentRun:
    """Runs what is not done yet, and returns the run as it was resolved.

    Args:
        run: the manifest, its paths absolute (`folder.resolve`).
        run_dir: the run's folder, absolute.
        force_restart: do stages again that were done with other content, and those after them.

    Raises:
        ConflictError: the folder holds stages of another manifest, or another process works on it.
        UnavailableError: a service cannot be started.
        StageFailed: a stage ended with an error.
    """
    _require_libraries()
    source_folder(run, run_dir)  # a wrong path is found before anything is made
    run_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(run_dir):
        removed = folder.settle(run, run_dir, force_restart=force_restart)
        folder.write_manifest(run, run_dir)
        with (
            nursery.opened(_loaded(run, run_dir), run_dir / "logs" / "nursery.log") as start,
            Usage(run_dir / "usage.json") as usage,
        ):
            with usage.phase("prepare"):
                run, base = _prepare(run, run_dir, start)
            removed += folder.settle(run, run_dir, force_restart=force_restart)
            for name in removed:
                usage.forget(name)
            with followed(run, run_dir, _environment(run, base, shared=False)):
                _run_stages(run, run_dir, base, usage, start)
                with usage.phase("report"):
                    conclude(run_dir, usage)
    return run


def _loaded(run: AlignmentRun, run_dir: Path) -> list[str]:
    """What the processes import that are still to come, except torchrun and its ranks, which begin by exec."""
    stages = [stage for name, stage in run.stages() if not (run_dir / name / "complete.json").is_file()]
    loaded = ["steersman.local.architecture", "steersman.nn.prepare", "steersman.nn.load"]
    if any(stage.uses_services for stage in stages):
        loaded += ["services.policy.build", "services.policy.servicer", "services.policy.weights"]
        loaded += ["services.reward.engine", "services.reward.servicer"]
        loaded += ["services.reference.engine", "services.reference.servicer"]
    return loaded + sorted({stage.runner.partition(":")[0] for stage in stages})


def _run_stages(run: AlignmentRun, run_dir: Path, base: Path, usage: Usage, start: process.Start) -> None:
    # Other users of this machine reach the ports, too.
    token = {RUN_TOKEN: secrets.token_urlsafe(32), SWITCH: "parent"}
    with (
        _weights_in_memory(run, base) as run,
        Supervisor(
            run_dir / "services", _environment(run, base) | token, run.spec.services.start_timeout_seconds, start
        ) as supervisor,
    ):
        pace = Pace(cache_folder() / "pace.json")
        names = run.stage_names()
        for number, name in enumerate(names, 1):
            if told := take_over(run, name, run_dir):
                say(name, told)
            if _is_done(run, name, run_dir):
                say(name, "is complete, see " + str(run_dir / name))
                continue
            services = services_of(run, name, run_dir, base)
            with usage.phase("services"):
                if services:
                    _await_given(run.spec.services)
                supervisor.ensure(services)
            overrides = endpoint_overrides(run, services, supervisor)
            try:
                with usage.phase(name):
                    environment = _environment(run, base, shared=bool(services)) | token
                    environment[AFTERWARDS] = _afterwards(pace, run, names[number:], run_dir)
                    _run_stage(run, name, run_dir, overrides, environment, supervisor, start)
            except StageFailed:
                conclude(run_dir, usage)  # a gate that is not passed has numbers to show
                raise
            say(name, f"complete after {clock(usage.seconds[name])}")
            pace.note(run, name, run_dir, usage.seconds[name])


def _afterwards(pace: Pace, run: AlignmentRun, names: Sequence[str], run_dir: Path) -> str:
    """The stages after one that are still to do, and how long they will take, where that is known."""
    left = [name for name in names if not (run_dir / name / "complete.json").is_file()]
    seconds = pace.expected_of_all(run, left)
    return f"{','.join(left)};{'' if seconds is None else f'{seconds:.1f}'}"


@contextmanager
def _weights_in_memory(run: AlignmentRun, base: Path) -> Iterator[AlignmentRun]:
    """The run with a folder in memory that weights go through, where it does not say otherwise."""
    policy = run.spec.services.policy
    if policy.weights_folder or policy.endpoints:
        yield run
        return
    # One publication, in numbers of up to twice the checkpoint's width.
    size = 2 * sum(path.stat().st_size for path in base.glob("*.safetensors"))
    with memory_folder(size) as memory:
        spec = run.spec.model_dump(mode="json", by_alias=True)
        spec["services"]["policy"]["weightsFolder"] = str(memory) if memory else None
        yield folder.with_spec(run, spec)


def _await_given(services: ServicesSpec) -> None:
    """Waits for the services that the manifest gives endpoints for, before own ones are started.

    Raises:
        UnavailableError: one does not answer.
    """
    given = [(name, target) for name in GRPC_NAMES for target in getattr(services, name).endpoints]
    for name, target in given:
        access = Access.to(getattr(services, name), f"spec.services.{name}")
        with ConsoleReporter("services") as reporter, access.open(target) as channel:
            reporter.activity(f"waiting for the {name} service at {target}")
            try:
                wait_ready(channel, GRPC_NAMES[name], services.start_timeout_seconds)
            except UnavailableError as error:
                raise UnavailableError(f"spec.services.{name}.endpoints: {target}: {error}") from None


def _run_stage(
    run: AlignmentRun,
    name: str,
    run_dir: Path,
    overrides: list[str],
    environment: dict[str, str],
    supervisor: Supervisor,
    start: process.Start,
) -> None:
    module, arguments = "training.stage", ["--run-dir", str(run_dir), "--stage", name]
    for override in overrides:
        arguments += ["--set", override]
    workers = run.spec.trainer.workers
    if workers > 1 and dict(run.stages())[name].shared_by_ranks:
        # Each rank dies with torchrun as torchrun does with this process.
        ranks = ["--one-machine", "--nproc-per-node", str(workers), "--module", "steersman.local.child", "0"]
        module, arguments, start = "training.ranks", [*ranks, module, *arguments], process.start
    run_child(name, module, arguments, run_dir / "logs" / f"{name}.log", environment, supervisor, start=start)


def run_child(
    name: str,
    module: str,
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    supervisor: Supervisor | None = None,
    *,
    show: bool = True,
    start: process.Start = process.start,
) -> None:
    """Runs a module to its end, keeping the services alive meanwhile; raises StageFailed with its last words.

    Args:
        show: its progress goes to standard output; False: to the log.
    """
    begin = log.stat().st_size if log.is_file() else 0
    child = start(module, arguments, log, environment, own_output=not show)
    try:
        while child.poll() is None:
            for told in supervisor.tend() if supervisor else ():
                say("services", told)
            time.sleep(0.2)
    finally:
        process.stop([child])
    code = child.wait()
    if code < 0:
        raise StageFailed(f"{name} was {process.cause(code)}; start the run again, it continues there", 128 - code)
    if code > 0:
        says = (f"{name}: ", "prepare: ")
        words = process.last_words(log, begin, says)
        # An unforeseen error leaves a stack trace in the log; its last line is not enough to act on.
        known = words.startswith(says)
        if not known and code == StorageError.exit_code:  # the log could not take the reason either
            raise StageFailed(
                f"{name}: the disk of {log.parent} is full or refuses; free some space and run again", code
            )
        raise StageFailed(words if known else f"{name} failed ({words}); {log} has the whole story", code)


def validate_run(run: AlignmentRun, run_dir: Path, *, show: bool = True) -> None:
    """Does what a run does before its first stage, in a folder of its own; errors are those of the run.

    Args:
        show: tell the progress.
    """
    found_digests(run, run_dir)
    folder.write_manifest(run, run_dir)
    log = run_dir / "logs" / "prepare.log"
    manifest = folder.manifest_path(run_dir)
    run_child("prepare", "steersman.local.prepare", [str(manifest)], log, _environment(run), show=show)


def _prepare(run: AlignmentRun, run_dir: Path, start: process.Start) -> tuple[AlignmentRun, Path]:
    """Base model, data, device and precision; what was decided once stays for the run's life."""
    path = run_dir / "prepared.json"
    manifest = folder.manifest_path(run_dir)
    data_is_there = run.spec.data.demo is None or (run_dir / "data").is_dir()
    known = _read_prepared(path)
    digests = found_digests(run, run_dir)
    if (
        known is None
        or (known["for"], known["data"]) != (run.spec.model.base, digests)
        or not Path(known["base"]).is_dir()
        or not data_is_there
    ):
        log = run_dir / "logs" / "prepare.log"
        run_child("prepare", "steersman.local.prepare", [str(manifest)], log, _environment(run), start=start)
        known = _read_prepared(path)
        assert known is not None
    else:
        check_evaluations(run, run_dir)  # an evaluation may have changed since
    spec = run.spec.model_dump(mode="json", by_alias=True)
    for field in ("precision", "device"):
        if spec["model"][field] == "auto":
            spec["model"][field] = known[field]
    run = folder.with_spec(run, spec)
    folder.write_manifest(run, run_dir)
    return run, Path(known["base"])


def _read_prepared(path: Path) -> dict[str, Any] | None:
    """What `prepare` found; None: nothing, or a file that was cut short, which it writes anew."""
    try:
        known = read_json(path, "")
    except ChecksumError:
        return None
    return known if known is not None and {"for", "base", "data", "precision", "device"} <= known.keys() else None


def _environment(run: AlignmentRun, base: Path | None = None, *, shared: bool = True) -> dict[str, str]:
    local = base is not None or "/" not in run.spec.model.base or Path(run.spec.model.base).is_dir()
    return process.child_environment(run.spec.model.threads, offline=local, shared=shared)


def _is_done(run: AlignmentRun, name: str, run_dir: Path) -> bool:
    if not (run_dir / name / "complete.json").is_file():
        return False
    with ConsoleReporter(name) as reporter:
        reporter.activity("comparing its files with their checksums")
        return folder.is_done(run, name, run_dir)


def conclude(run_dir: Path, usage: Usage, *, again: bool = False, show: bool = True) -> None:
    """Report, summary and table of the newest evaluation; nothing where there is none.

    Args:
        again: draw the report also where it is newer than the evaluation.
        show: tell of it; False: nothing is printed.
    """
    from steersman.report.schema import newest_evaluation, read_evaluation

    found = newest_evaluation(run_dir)
    if found is None:
        return
    from rich.console import Console

    from steersman.local.knowledge import known_of
    from steersman.report.summary import render_table, summarise

    seconds = {name: value for name, value in usage.seconds.items() if name != "report"}
    evaluation = read_evaluation(found)
    known = {"knowledge": known_of(run_dir)} if not evaluation.knowledge else {}
    evaluation = evaluation.model_copy(update={"seconds": seconds, "peak_memory_gib": usage.peak_memory_gib, **known})
    report = run_dir / "report" / "report.html"
    if again or not report.is_file() or report.stat().st_mtime < found.stat().st_mtime:
        from steersman.report.report import write_report

        with ConsoleReporter("report") if show else contextlib.nullcontext() as reporter:
            if reporter is not None:
                reporter.activity("drawing")
            write_report(run_dir, evaluation, report.parent)
    (run_dir / "summary.json").write_text(json.dumps(summarise(evaluation)) + "\n", encoding="utf-8")
    if show:
        Console().print(render_table(evaluation))
        say("report", str(report))


@contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Keeps a second process away from the run's folder."""
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"{run_dir} is being worked on by another steersman run; wait for it or stop it"
            ) from None
        yield


def _require_libraries() -> None:
    """Before anything is started, because a missing library would show in a child's log only."""
    missing = [name for name in ("torch", "transformers", "trl", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is not installed; pip install 'steersman[training]'")
