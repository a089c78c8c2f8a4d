"""How long stages take on this machine, from run to run: what a run knows of the stages that it has not begun.

    <cache>/pace.json     {"key": [seconds a step, steps], ...}, the latest last

A stage is the same when kind, options, model and data are; of another number of steps it takes its share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steersman.artifacts import write_whole
from steersman.config.manifest import AlignmentRun

_MOST = 200
_STEPS = ("steps", "max_steps", "rounds")
"""Options that say how many steps a stage makes."""


class Pace:
    def __init__(self, path: Path) -> None:
        self._path = path

    def expected(self, run: AlignmentRun, name: str) -> float | None:
        """Seconds that a stage will take; None: nothing like it has run here."""
        found = self._read().get(_key(run, name))
        if found is None:
            return None
        seconds, steps = found
        options = dict(run.stages())[name]
        wanted = next((said for field in _STEPS if (said := getattr(options, field, None))), steps)
        return float(seconds * wanted)

    def expected_of_all(self, run: AlignmentRun, names: Sequence[str]) -> float | None:
        """Of several stages together; None where one is not known."""
        each = [self.expected(run, name) for name in names]
        return None if None in each else sum(seconds for seconds in each if seconds is not None)

    def note(self, run: AlignmentRun, name: str, run_dir: Path, seconds: float) -> None:
        """Remembers how long a stage took. Where that cannot be written, the next run knows less."""
        steps = _steps_of(run_dir / name / "metrics.jsonl")
        known = self._read()
        known.pop(_key(run, name), None)
        known[_key(run, name)] = (seconds / steps, steps)
        with contextlib.suppress(OSError):
            write_whole(self._path, json.dumps(dict(list(known.items())[-_MOST:])))

    def _read(self) -> dict[str, tuple[float, int]]:
        """What is known; nothing where the file is damaged."""
        try:
            found = json.loads(self._path.read_bytes())
            return {str(key): (float(seconds), int(steps)) for key, (seconds, steps) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def _key(run: AlignmentRun, name: str) -> str:
    spec = run.spec
    options: dict[str, Any] = dict(run.stages())[name].model_dump(mode="json", exclude=set(_STEPS))
    # Precision and device are decided once for a machine.
    same = [
        name,
        options,
        spec.model.model_dump(mode="json", exclude={"precision", "device"}),
        spec.data.model_dump(mode="json"),
        spec.trainer.workers,
    ]
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:32]


def _steps_of(metrics: Path) -> int:
    """Steps that a stage made; 1 for one that makes none."""
    try:
        last = metrics.read_bytes().splitlines()[-1]
        return max(1, int(json.loads(last)["step"]))
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return 1
