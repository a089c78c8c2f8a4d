"""Progress that people can follow and programs can read, and the metrics file of a stage.

    rl  [####------] step 5/24  reward 0.42  kl 0.013  312 tok/s  left 3:41, in all about 4:30

What comes after the stage is known from whoever runs it (`AFTERWARDS`). On a terminal it is one moving bar; with
`STEERSMAN_PROGRESS=json` it is JSON lines, one event each.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from steersman.artifacts import storage_errors, whole_file

QUIET_SECONDS = 3.5
"""Longest silence; the promise to users is 5 seconds."""
_SHOWN = ("reward", "loss", "eval_loss", "accuracy", "kl")
"""Metrics on the line; all of them are in the metrics file."""
WORKING = "working on step"
"""How the activity begins that leads to a step."""
_RECENT = 8
"""Steps that the estimate of the time left looks back on."""


AFTERWARDS = "STEERSMAN_AFTERWARDS"
"""Environment variable: the stages that follow, separated by commas, `;`, and the seconds that they took in an earlier
run of the same; none where that is not known."""


@dataclass(frozen=True)
class TimeLeft:
    """What is left to do, in seconds."""

    stage: float
    """Of the stage, by its own last steps."""
    then: tuple[str, ...] = ()
    """Stages that follow."""
    later: float | None = None
    """Of these; None: not known."""

    @staticmethod
    def from_environment(stage: float) -> TimeLeft:
        names, _, seconds = os.environ.get(AFTERWARDS, "").partition(";")
        then = tuple(name for name in names.split(",") if name)
        try:
            later = float(seconds)
        except ValueError:
            return TimeLeft(stage, then)
        return TimeLeft(stage, then, later if math.isfinite(later) else None)

    @property
    def whole(self) -> float | None:
        """Of the run; None: not known."""
        return self.stage if not self.then else None if self.later is None else self.stage + self.later

    def __str__(self) -> str:
        left = f"left {clock(self.stage)}"
        if self.then:
            left += f", then {', '.join(self.then)}" if self.whole is None else f", in all about {clock(self.whole)}"
        return left


class ConsoleReporter:
    """Tells of a stage's progress; a context manager, because a heartbeat runs beside it.

    Every call of `step` also becomes one row `{"step", "total", **metrics}` of the metrics file. A run that continues
    repeats steps: the rows from its first step on are dropped, so that the file reads like that of an unbroken run.
    """

    def __init__(self, stage: str, metrics_path: Path | None = None, *, stream: TextIO | None = None) -> None:
        """Args:
        stage: name that begins every line.
        metrics_path: JSONL file, written as the stage goes on; None: no file.
        stream: where progress goes; None: standard output.
        """
        self._stage = stage
        self._metrics = metrics_path
        self._view = _choose_view(stage, stream or sys.stdout)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="progress")
        self._activity = "starting"
        self._activity_since = self._last_shown = time.monotonic()
        self._continued = False
        self._times: deque[float] = deque(maxlen=_RECENT + 1)

    def __enter__(self) -> ConsoleReporter:
        self._times.append(time.monotonic())
        self._view.open()
        self._thread.start()
        if self._metrics is not None and self._metrics.exists():
            self._settle(sys.maxsize)  # a stage that was killed after its last step writes no row any more
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._view.close()

    def step(self, step: int, total: int, **metrics: float) -> None:
        """`step` of `total` optimizer steps is done."""
        if self._metrics is not None:
            self._append({"step": step, "total": total, **{key: _plain(value) for key, value in metrics.items()}})
        with self._lock:
            self._times.append(time.monotonic())
            left = self._time_left(total - step)
            self._set_activity("working")
            self._view.step(step, total, metrics, left)

    @contextlib.contextmanager
    def rows_in(self, metrics_path: Path) -> Iterator[None]:
        """Inside, rows go to another file: those of a part that counts its steps anew."""
        before, self._metrics, self._continued = (self._metrics, self._continued), metrics_path, False
        try:
            yield
        finally:
            self._metrics, self._continued = before

    def note(self, text: str) -> None:
        """One line about what happens now."""
        with self._lock:
            self._set_activity(text)
            self._steps_begin()
            self._view.note(text)

    def activity(self, text: str) -> None:
        """What is going on; cheap enough for an inner loop, shown when nothing else is."""
        with self._lock:
            same_work = text.partition(" ")[0] == self._activity.partition(" ")[0]
            self._activity = text
            if not same_work:
                self._activity_since = time.monotonic()
            if text.startswith(WORKING):
                self._steps_begin()

    def _set_activity(self, text: str) -> None:
        self._activity = text
        self._activity_since = self._last_shown = time.monotonic()

    def _steps_begin(self) -> None:
        """Before the first step: what was done until now is no step, and loading would make the estimate hours."""
        if len(self._times) == 1:
            self._times[0] = time.monotonic()

    def _time_left(self, steps: int) -> TimeLeft | None:
        if len(self._times) < 2:
            return None
        return TimeLeft.from_environment(steps * (self._times[-1] - self._times[0]) / (len(self._times) - 1))

    def _beat(self) -> None:
        while not self._done.wait(0.5):
            with self._lock:
                now = time.monotonic()
                if now - self._last_shown >= self._view.quiet_seconds:
                    self._last_shown = now
                    self._view.activity(self._activity, now - self._activity_since)

    def _append(self, row: Mapping[str, Any]) -> None:
        assert self._metrics is not None
        with storage_errors(self._metrics):
            if not self._continued:
                self._settle(row["step"])
                self._continued = True
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _settle(self, step: int) -> None:
        assert self._metrics is not None
        with storage_errors(self._metrics):
            damaged = drop_rows_from(self._metrics, step)
        if damaged:
            self.note(f"{damaged} damaged lines of {self._metrics} went to {self._metrics.name}.damaged")


def say(stage: str, text: str) -> None:
    """One line, or event, outside a stage's loop."""
    view = _JsonLines(stage, sys.stdout) if _wants_json() else _Lines(stage, sys.stdout)
    view.note(text)


def drop_rows_from(path: Path, step: int) -> int:
    """Removes the rows of `step` and later steps, and the torn last line of a killed writer; makes the folder.

    Returns:
        Number of damaged lines, which go to a file `.damaged` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [_row_of(line) for line in lines]
    kept = [line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] < step]
    damaged = [line for line, row in zip(lines, rows, strict=True) if row is None and line.endswith(b"\n")]
    if damaged:
        with path.with_name(f"{path.name}.damaged").open("ab") as file:
            file.writelines(damaged)
    if kept != lines:
        with whole_file(path) as partial:
            partial.write_bytes(b"".join(kept))
    return len(damaged)


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row of a whole line; None for a torn or damaged one."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _plain(value: float) -> float | None:
    """A number that JSON has; None for NaN and infinity."""
    return value if math.isfinite(value) else None


class _View(Protocol):
    """One way of showing progress."""

    quiet_seconds: float

    def open(self) -> None: ...
    def close(self) -> None: ...
    def step(self, step: int, total: int, metrics: Mapping[str, float], left: TimeLeft | None) -> None: ...
    def note(self, text: str) -> None: ...
    def activity(self, text: str, seconds: float) -> None: ...


def _wants_json() -> bool:
    return os.environ.get("STEERSMAN_PROGRESS") == "json"


def _choose_view(stage: str, stream: TextIO) -> _View:
    if _wants_json():
        return _JsonLines(stage, stream)
    return _Bar(stage, stream) if stream.isatty() else _Lines(stage, stream)


class _Lines:
    """Text lines, for pipes and logs."""

    quiet_seconds = QUIET_SECONDS

    def __init__(self, stage: str, stream: TextIO) -> None:
        self._stage = stage
        self._stream = stream

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def step(self, step: int, total: int, metrics: Mapping[str, float], left: TimeLeft | None) -> None:
        filled = round(10 * step / max(1, total))
        parts = [f"[{'#' * filled}{'-' * (10 - filled)}] step {step}/{total}", *shown_metrics(metrics)]
        self.note("  ".join([*parts, *([str(left)] if left else [])]))

    def note(self, text: str) -> None:
        print(f"{self._stage}  {text}", file=self._stream, flush=True)

    def activity(self, text: str, seconds: float) -> None:
        self.note(f"... {text} ({seconds:.0f} s)")


class _JsonLines(_Lines):
    """One JSON object a line, for the controller."""

    def step(self, step: int, total: int, metrics: Mapping[str, float], left: TimeLeft | None) -> None:
        plain = {key: _plain(value) for key, value in metrics.items()}
        seconds = {"seconds_left": left and round(left.stage, 1)}
        if left and left.then:
            seconds["run_seconds_left"] = left.whole and round(left.whole, 1)
        self._print(event="progress", step=step, total=total, **seconds, **plain)

    def note(self, text: str) -> None:
        self._print(event="note", text=text)

    def activity(self, text: str, seconds: float) -> None:
        self._print(event="activity", text=text, activity_seconds=round(seconds, 1))

    def _print(self, *, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, "stage": self._stage, **fields}), file=self._stream, flush=True)


class _Bar:
    """One moving line on a terminal."""

    quiet_seconds = 0.5

    def __init__(self, stage: str, stream: TextIO) -> None:
        self._progress = Progress(
            TextColumn(f"[bold]{stage}"),
            BarColumn(20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[activity]}", style="dim", markup=False),
            console=Console(file=stream),
            refresh_per_second=2,
        )
        self._task: TaskID = self._progress.add_task("", total=None, activity="")

    def open(self) -> None:
        self._progress.start()

    def close(self) -> None:
        self._progress.update(self._task, activity="")
        self._progress.stop()

    def step(self, step: int, total: int, metrics: Mapping[str, float], left: TimeLeft | None) -> None:
        parts = [f"{step}/{total}", *shown_metrics(metrics)]
        description = "  ".join([*parts, *([str(left)] if left else [])])
        self._progress.update(self._task, completed=step, total=total, description=description)

    def note(self, text: str) -> None:
        self._progress.update(self._task, activity=text)

    def activity(self, text: str, seconds: float) -> None:
        self._progress.update(self._task, activity=f"{text} ({seconds:.0f} s)")


def shown_metrics(metrics: Mapping[str, float]) -> list[str]:
    """The few metrics that a line has room for."""
    parts = [f"{name} {metrics[name]:.3g}" for name in _SHOWN if name in metrics]
    if "tokens_per_s" in metrics:
        parts.append(f"{metrics['tokens_per_s']:.0f} tok/s")
    return parts


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
