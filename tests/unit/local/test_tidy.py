"""What stays of a run's folder when its time is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.errors import ConfigError
from steersman.local.tidy import tidy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "demo"
    for name in (
        "manifest.yaml",
        "summary.json",
        "report/index.html",
        "sft/model/model.safetensors",
        "rl/checkpoints/3/state",
        "release/release.json",
        "release/model/model.safetensors",
        "logs/policy.log",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data").write_text("keep")
    (folder / "data").symlink_to(tmp_path / "elsewhere")
    return folder


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_released_model_and_what_it_was_made_by_stay(run):
    assert tidy(run, keep_released=True) == ["data", "logs", "rl", "sft"]
    assert left(run) == {"manifest.yaml", "summary.json", "report", "release"}
    assert (run / "release/model/model.safetensors").is_file()
    assert (run.parents[1] / "elsewhere/data").read_text() == "keep", "a link goes, what it shows stays"
    assert tidy(run, keep_released=True) == []


def test_or_nothing_stays(run):
    tidy(run, keep_released=False)
    assert not run.exists()
    assert tidy(run, keep_released=False) == [], "again is no error"


def test_a_folder_that_is_no_runs_is_left_alone(tmp_path):
    (tmp_path / "valuable").write_text("x")
    with pytest.raises(ConfigError, match="nothing is removed"):
        tidy(tmp_path, keep_released=False)
    assert left(tmp_path) == {"valuable"}
