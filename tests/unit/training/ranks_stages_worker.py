"""One rank of test_ranks: runs stages one after the other.

`STAGE@N` dies in that stage behind its N-th step, whose checkpoint is written; in `STAGE~N` the first rank gets SIGTERM
there, and all ranks end and save the step that has begun.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import training.offline.trl_setup
from steersman import leaving
from training.stage import run_stage


def die_behind(step: int) -> None:
    """Lets every step write a checkpoint, and has the first rank killed when it begins the step after this one."""
    training.offline.trl_setup.CHECKPOINT_SECONDS = 0.0
    training.offline.trl_setup.CHECKPOINT_SHARE = float("inf")

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    training.offline.trl_setup.Progress.on_step_begin = on_step_begin  # type: ignore[method-assign]


def leave_behind(step: int) -> None:
    leaving.listen()

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    training.offline.trl_setup.Progress.on_step_begin = on_step_begin  # type: ignore[method-assign]


def run_stages(run_dir: Path, *stages: str) -> None:
    for stage in stages:
        name, how, last = re.fullmatch(r"([^@~]+)([@~]?)(\d*)", stage).groups()  # type: ignore[union-attr]
        if how:
            {"@": die_behind, "~": leave_behind}[how](int(last))
        run_stage(run_dir, name, [])
