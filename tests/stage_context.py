"""A training stage's context without a run around it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from steersman.config.manifest import DataSpec, DemoData, EvaluateStage, RunSpec, Stage
from steersman.metric_names import is_known
from training.context import DataFiles, StageContext


class Recorder:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, dict[str, float]]] = []
        self.notes: list[str] = []

    def step(self, step: int, total: int, **metrics: float) -> None:
        assert not (unknown := [name for name in metrics if not is_known(name)]), (
            f"no place in the reference: {unknown}"
        )
        self.steps.append((step, total, metrics))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def activity(self, text: str) -> None:
        self.notes.append(text)

    def rows_in(self, metrics_path: Path) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def stage_context(folder: Path, model: Path, data: dict[str, DataFiles]) -> StageContext:
    """A stage that starts from `model` and writes to `folder`/stage."""
    stage_dir = folder / "stage"
    stage_dir.mkdir(exist_ok=True)
    return StageContext(
        run=None,  # type: ignore[arg-type]
        run_dir=folder,
        stage_dir=stage_dir,
        name="stage",
        spec=RunSpec(data=DataSpec(demo=DemoData()), stages=[Stage(evaluate=EvaluateStage())]),
        base_model=model,
        policy_model=model,
        seed=17,
        reporter=Recorder(),
        device="cpu",
        precision="fp32",
        cache_dir=folder / "cache",
        data=data,
    )
