"""The table of `benchmarks.algorithms` is made of all cells that are there, whichever call made them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import algorithms_base
from benchmarks.algorithms import COLUMNS, difference, done, manifest, write_figures
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun
from steersman.nn.load import load_causal_lm, load_tokenizer


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        out=tmp_path / "cells",
        base="small",
        learning_rate=1e-3,
        budget=32,
        start_steps=2,
        offline_steps=2,
        prompts=2,
    )


def write_cell(arguments: argparse.Namespace, method: str, seed: int, **values: Any) -> None:
    folder = arguments.out / f"seed-{seed}" / method
    folder.mkdir(parents=True)
    columns = {name: [0.0, 0.0] for name in COLUMNS} | values
    cell = {"method": method, "seed": seed, "manifest": manifest(arguments, method, seed), "seconds": 1.0, **columns}
    (folder / "cell.json").write_text(json.dumps(cell))


def test_cells_of_several_calls_are_one_table(arguments: argparse.Namespace) -> None:
    for seed in (1, 2):
        write_cell(arguments, "start", seed, reward=[])
        write_cell(arguments, "offline-sft", seed, rubric=[0.2, 0.4], reward=[])
        write_cell(arguments, "ilql", seed, rubric=[0.6, 0.8], reward=[])
    write_cell(arguments, "judge", 1, reward=[0.5, 0.7])
    report = write_figures(arguments)
    assert report == json.loads((arguments.out.parent / "cells.json").read_text())
    rows = {row["method"]: row for row in report["table"]}
    assert list(rows) == ["start", "offline-sft", "ilql"]
    assert rows["start"]["reward_by_seed"] == [0.6]  # of the seed whose reward model is there
    assert rows["ilql"]["reward"] is None
    assert rows["ilql"]["rubric"][0] == pytest.approx(0.7)
    assert rows["ilql"]["seeds"] == [1, 2]
    assert report["ilql_minus_sft"] == pytest.approx([0.4, 0.4, 0.4])


def test_a_cell_of_other_options_is_made_again(arguments: argparse.Namespace) -> None:
    write_cell(arguments, "start", 1)
    assert done(arguments, "start", 1)
    arguments.prompts = 3
    assert done(arguments, "start", 1) is None
    assert write_figures(arguments)["table"] == []


def test_a_difference_needs_both_methods() -> None:
    cells = [{"method": method, "seed": 1, "rubric": [0.0, 1.0]} for method in ("ilql", "offline-sft")]
    assert difference(cells[:1], "ilql", "offline-sft") is None
    assert difference(cells, "ilql", "offline-sft") == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("method", ["start", "judge", "ilql", "offline-sft", "nlpo", "dapo", "online-dpo", "dpo"])
def test_every_cell_is_a_valid_run(arguments: argparse.Namespace, method: str) -> None:
    run = load_model(AlignmentRun, manifest(arguments, method, 1), "cell")
    kinds = [stage.kind for stage in run.spec.stages]
    assert kinds[:2] == {"start": ["sft"], "ilql": ["ilql"], "offline-sft": ["sft"]}.get(
        method, ["sft", "reward_model"]
    )


def test_the_small_base_model_reads_digits_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms_base, "ROWS", 6)
    monkeypatch.setattr(algorithms_base, "BATCH", 2)
    algorithms_base.make(tmp_path / "base", steps=[1, 1])
    assert load_tokenizer(tmp_path / "base").tokenize("407") == ["4", "0", "7"]
    assert load_causal_lm(tmp_path / "base").config.vocab_size <= algorithms_base.VOCABULARY
