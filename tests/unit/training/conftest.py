"""A stage's context over tiny models, and rows to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_context import stage_context

from steersman.testing.models import save_model_folder, tiny_llama
from training.context import DataFiles, StageContext


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
        return stage_context(tmp_path, model, {kind: DataFiles(**files)})

    return make


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
