"""How long a run still takes, by earlier runs on this machine, and how it is told."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun
from steersman.local.pace import Pace
from steersman.progress import AFTERWARDS, ConsoleReporter, TimeLeft


def run(seed: int = 1, steps: int = 10, **data: Any) -> AlignmentRun:
    document = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "a-run"},
        "spec": {
            "seed": seed,
            "data": {"demo": data},
            "stages": [{"sft": {}}, {"rewardModel": {}}, {"rl": {"steps": steps}}, {"evaluate": {}}],
        },
    }
    return load_model(AlignmentRun, document, "test")


def done(folder: Path, name: str, steps: int) -> None:
    (folder / name).mkdir()
    rows = "".join(json.dumps({"step": step, "total": steps}) + "\n" for step in range(1, steps + 1))
    (folder / name / "metrics.jsonl").write_text(rows)


def test_a_stage_takes_what_it_took_by_its_steps(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "cache/pace.json")
    assert pace.expected(run(), "rl") is None
    done(tmp_path, "rl", 10)
    pace.note(run(), "rl", tmp_path, 50.0)
    assert pace.expected(run(seed=2), "rl") == 50.0
    assert pace.expected(run(steps=40), "rl") == 200.0
    assert pace.expected(run(preferences=32), "rl") is None, "of other data nothing is known"
    assert pace.expected_of_all(run(), ["rl", "evaluate"]) is None
    pace.note(run(), "evaluate", tmp_path, 7.0)  # without rows
    assert pace.expected_of_all(run(), ["rl", "evaluate"]) == 57.0
    assert pace.expected_of_all(run(), []) == 0.0


def test_a_damaged_or_closed_file_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "pace.json"
    for text in ("{", "[]", '{"a": 1}', '{"a": ["x", 2]}', "null"):
        path.write_text(text)
        assert Pace(path).expected(run(), "rl") is None
    (tmp_path / "file").write_text("")
    Pace(tmp_path / "file" / "pace.json").note(run(), "rl", tmp_path, 1.0)


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "pace.json")
    for count in range(1, 206):
        pace.note(run(preferences=count), "rl", tmp_path, 1.0)
    assert len(json.loads((tmp_path / "pace.json").read_text())) == 200
    assert pace.expected(run(preferences=205), "rl") is not None


@pytest.mark.parametrize(
    ("afterwards", "told", "whole"),
    [
        ("", "left 1:30", 90.0),
        (";0.0", "left 1:30", 90.0),
        ("rl,evaluate;", "left 1:30, then rl, evaluate", None),
        ("rl,evaluate;210.5", "left 1:30, in all about 5:00", 300.5),
        ("rl;nan", "left 1:30, then rl", None),
    ],
)
def test_the_time_left_says_what_is_known(
    afterwards: str, told: str, whole: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AFTERWARDS, afterwards)
    left = TimeLeft.from_environment(90.0)
    assert (str(left), left.whole) == (told, whole)


def test_programs_read_the_time_left_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_PROGRESS", "json")
    monkeypatch.setenv(AFTERWARDS, "evaluate;100")
    out = io.StringIO()
    with ConsoleReporter("rl", stream=out) as reporter:
        reporter.step(1, 2, reward=1.0)
    (event,) = [json.loads(line) for line in out.getvalue().splitlines()]
    assert event["run_seconds_left"] >= 100.0
    assert event["run_seconds_left"] == pytest.approx(event["seconds_left"] + 100.0, abs=0.11)
