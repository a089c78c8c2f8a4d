"""A stage's context over tiny models, and rows to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steersman.config.manifest import DataSpec, DemoData, EvaluateStage, RunSpec, Stage
from steersman.testing.models import save_model_folder, tiny_llama
from training.context import DataFiles, StageContext


class Recorder:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, dict[str, float]]] = []
        self.notes: list[str] = []

    def step(self, step: int, total: int, **metrics: float) -> None:
        self.steps.append((step, total, metrics))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def activity(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("models") / "llama", tiny_llama())


@pytest.fixture
def make_context(tmp_path: Path, base_model: Path) -> Callable[..., StageContext]:
    """`make_context("preferences", rows, validation=rows, folder=...)` writes the rows and points a context at them."""

    def make(kind: str, train: list[dict[str, Any]], *, model: Path = base_model, **splits: Any) -> StageContext:
        files = {}
        for split, rows in {"train": train, **splits}.items():
            files[split] = tmp_path / f"{kind}.{split}.jsonl"
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage_dir = tmp_path / "stage"
        stage_dir.mkdir(exist_ok=True)
        return StageContext(
            run=None,  # type: ignore[arg-type]
            run_dir=tmp_path,
            stage_dir=stage_dir,
            name="stage",
            spec=RunSpec(data=DataSpec(demo=DemoData()), stages=[Stage(evaluate=EvaluateStage())]),
            base_model=model,
            policy_model=model,
            seed=17,
            reporter=Recorder(),
            device="cpu",
            precision="fp32",
            cache_dir=tmp_path / "cache",
            data={kind: DataFiles(**files)},
        )

    return make


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
