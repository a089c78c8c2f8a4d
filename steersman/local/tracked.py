"""The process that follows a run for its trackers (`steersman.tracking`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from steersman.config.manifest import AlignmentRun
from steersman.local import process
from steersman.tracking.sinks import EMBEDDED, TRACKING_URI

SWITCH = "STEERSMAN_TRACKING"
"""Environment variable; `off` switches tracking off, `parent`: the process that started this one does it."""
_GRACE = 60.0


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
    arguments = [str(run_dir), *(["--part"] if part else [])]
    child = process.start("steersman.tracking.follow", arguments, log, dict(environment), own_output=True)
    try:
        yield
    finally:
        process.stop([child], _GRACE)
