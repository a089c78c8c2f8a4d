"""Sends what a run's folder holds to its trackers, and goes on while the run does.

    python -m steersman.tracking.follow RUN_DIR [--part]    ends after a last look when it gets SIGTERM

`--part`: of the run only this stage ends with it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steersman.artifacts import write_whole
from steersman.config.manifest import AlignmentRun, load_manifest
from steersman.config.stages import read_complete
from steersman.errors import SteersmanError
from steersman.tracking.sinks import Sink, open_sinks

STATE_FILE = "tracking.json"
_SECONDS = 2.0
_ARTIFACTS = ("config.yaml", "evaluation.json", "gates.json", "watch.jsonl", "release.json", "model/README.md")
_OF_RUN = ("manifest.yaml", "summary.json", "report/report.html")


class Follower:
    """What was sent already lies in `tracking.json`, so that nothing is sent twice."""

    def __init__(self, run: AlignmentRun, run_dir: Path, open_them: Callable[..., Sequence[Sink]] = open_sinks) -> None:
        self._run, self._dir = run, run_dir
        state = _read(run_dir / STATE_FILE)
        self._ids: dict[str, str] = state.get("ids", {})
        self._rows: dict[str, int] = state.get("rows", {})
        self._sent: dict[str, float] = state.get("sent", {})
        self._sinks = open_them(run, run_dir, self._ids)
        self._save()

    def look(self) -> None:
        """Sends what is new."""
        before = (dict(self._rows), dict(self._sent))
        for stage in self._run.stage_names():
            folder = self._dir / stage
            if self._is_new(folder / "config.yaml"):
                position = self._run.stage_names().index(stage)
                spec = self._run.spec.stages[position].spec.model_dump(mode="json", by_alias=True)
                self._params(flat(spec, stage))
            self._metrics(stage, folder / "metrics.jsonl")
            if read_complete(self._dir, stage) is not None:
                self._artifacts([folder / name for name in _ARTIFACTS], stage)
        self._artifacts([self._dir / name for name in _OF_RUN], "")
        summary = self._dir / "summary.json"
        if self._is_new(summary, "numbers"):
            values = dict(_numbers(_read(summary), "summary"))
            if values:
                for sink in self._sinks:
                    sink.metrics(values, 0)
        if before != (self._rows, self._sent):
            self._save()

    def close(self, *, part: bool = False) -> None:
        """A last look.

        Args:
            part: stages to come are other processes', so that the run is over only when all its stages are complete.
        """
        self.look()
        done = all(read_complete(self._dir, stage) for stage in self._run.stage_names())
        for sink in self._sinks:
            sink.close("FINISHED" if done else "RUNNING" if part else "FAILED")

    def _params(self, values: Mapping[str, str]) -> None:
        spec = self._run.spec
        about = {"seed": str(spec.seed), "model": spec.model.base}
        for sink in self._sinks:
            sink.params({**about, **values})

    def _metrics(self, stage: str, path: Path) -> None:
        if not path.is_file():
            return
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        # A stage that began anew has fewer rows; steps that it repeats have the same values.
        start = min(self._rows.get(stage, 0), len(lines))
        for line in lines[start:]:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            values = {f"{stage}/{key}": float(value) for key, value in row.items() if key != "step" and _finite(value)}
            if values:
                for sink in self._sinks:
                    sink.metrics(values, int(row.get("step", 0)))
        self._rows[stage] = len(lines)

    def _artifacts(self, paths: Sequence[Path], folder: str) -> None:
        for path in paths:
            if self._is_new(path, "file"):
                for sink in self._sinks:
                    sink.artifact(path, folder)

    def _is_new(self, path: Path, what: str = "read") -> bool:
        """Whether a file is there and has changed since it was sent."""
        if not path.is_file():
            return False
        key, time = f"{what}:{path.relative_to(self._dir)}", path.stat().st_mtime
        if self._sent.get(key) == time:
            return False
        self._sent[key] = time
        return True

    def _save(self) -> None:
        state = {"ids": self._ids, "rows": self._rows, "sent": self._sent}
        write_whole(self._dir / STATE_FILE, json.dumps(state, indent=1))


def flat(value: Any, path: str) -> dict[str, str]:
    """Nested data as `path.field` to text; lists of plain values stay together, what is not set is left out."""
    if isinstance(value, Mapping):
        return {name: text for key, part in value.items() for name, text in flat(part, f"{path}.{key}").items()}
    if isinstance(value, list) and value and any(isinstance(part, Mapping | list) for part in value):
        return {name: text for at, part in enumerate(value) for name, text in flat(part, f"{path}.{at}").items()}
    return {} if value is None or value == [] else {path: str(value)}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Numbers of `summary.json` by path; of an interval [estimate, low, high] the ends stand beside it."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{path}/{key}" if path == "summary" else f"{path}.{key}")
    elif isinstance(value, list) and len(value) == 3 and all(map(_finite, value)):
        yield from zip((path, f"{path}.low", f"{path}.high"), map(float, value), strict=True)
    elif _finite(value):
        yield path, float(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def main() -> None:
    os.nice(10)
    run_dir = Path(sys.argv[1])
    ends = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ends.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's whole group; whoever started this ends it
    try:
        follower = Follower(load_manifest(run_dir / "manifest.yaml"), run_dir)
    except SteersmanError as error:
        print(f"tracking: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    while not ends.wait(_SECONDS):
        follower.look()
    follower.close(part="--part" in sys.argv[2:])


if __name__ == "__main__":
    main()
