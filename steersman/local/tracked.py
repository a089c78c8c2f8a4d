"""The process that follows a run for its trackers (`steersman.tracking`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from steersman.config.manifest import AlignmentRun
from steersman.local import process
from steersman.progress import say
from steersman.tracking.follow import STATE_FILE
from steersman.tracking.sinks import EMBEDDED, TRACKING_URI

SWITCH = "STEERSMAN_TRACKING"
"""Environment variable; `off` switches tracking off, `parent`: the process that started this one does it."""
_FEW_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}
"""A server that is away is given up after seconds, not minutes."""
_GRACE = 300.0
"""Seconds for the first and for the last look: a busy machine makes a database slowly."""


@contextmanager
def followed(run: AlignmentRun, run_dir: Path, environment: Mapping[str, str], *, part: bool = False) -> Iterator[None]:
    """Inside, a process of its own follows the run's folder, where `spec.tracking` wants it.

    Args:
        part: a single stage, as a pod runs one; it leaves MLflow's database in a file out.
    """
    spec = run.spec.tracking
    elsewhere = spec.mlflow not in (None, EMBEDDED) or TRACKING_URI in os.environ
    wanted = spec.mlflow is not None and (elsewhere or not part)
    switch = os.environ.get(SWITCH, "")
    if not spec.enabled or switch in ("off", "parent") or not (wanted or spec.tensorboard or spec.wandb):
        yield
        return
    log = run_dir / "logs" / "tracking.log"
    state = run_dir / STATE_FILE
    before = _time_of(state)
    begin = log.stat().st_size if log.is_file() else 0
    arguments = [str(run_dir), *(["--part"] if part else [])]
    child = process.start(
        "steersman.tracking.follow", arguments, log, _FEW_RETRIES | dict(environment), own_output=True
    )
    try:
        yield
    finally:
        until = time.monotonic() + _GRACE
        # One that is told to end before it has begun would send nothing.
        while child.poll() is None and _time_of(state) == before and time.monotonic() < until:
            time.sleep(0.1)
        process.stop([child], _GRACE)
        if child.returncode:  # a tracker that is away is no reason to end a training, but is said
            say("tracking", f"did not reach its end: {process.last_words(log, begin, ('tracking: ',))}")


def _time_of(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None
