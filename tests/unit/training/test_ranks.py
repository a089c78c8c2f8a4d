"""Two ranks (gloo, FSDP2 on CPU) train as one does."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_stages_worker import run_stages
from ranks_worker import CASES, STEPS, curves, write_curves
from safetensors.torch import load_file
from two_ranks import run_on_two_ranks

from steersman.config.base import dump_yaml, load_model
from steersman.config.manifest import AlignmentRun
from steersman.nn.ilql import read_heads
from training.parallel import Ranks
from training.stage import run_stage


def test_two_ranks_give_the_loss_curve_of_one(tiny_model: Path, tmp_path: Path) -> None:
    """Every algorithm, all weights or an adapter: losses, norms and weights agree to 1e-4 over ten steps."""
    out = tmp_path / "two.json"
    run_on_two_ranks(write_curves, tiny_model, out, folder=tmp_path)
    two = json.loads(out.read_text())
    one = curves(tiny_model, tmp_path, Ranks())
    assert set(two) == set(CASES)
    for name in CASES:
        assert len(one[name]) == STEPS + 1
        moved = abs(one[name][0]["policy_loss"] - one[name][-2]["policy_loss"])
        assert moved > 1e-3, name  # the curve is no straight line that any number of ranks would draw
        for step, (expected, found) in enumerate(zip(one[name], two[name], strict=True), start=1):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), (name, step)


def test_two_ranks_train_the_stages_of_trl_as_one_does(tiny_model: Path, tmp_path: Path) -> None:
    """SFT, reward models, DPO and ILQL, sharded by FSDP: losses and weights are those of one rank, also when the ranks
    are killed and go on from their checkpoint, with all weights (SFT) or an adapter (reward model).
    """
    from test_dpo_kto import pairs, thumbs

    rows = {
        "demonstrations": [{"messages": [*row["prompt"], *row["chosen"]]} for row in pairs(16)],
        "preferences": pairs(16),
        "feedback": thumbs(16),
    }
    for kind, items in rows.items():
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    sizes: dict[str, Any] = {
        "maxSteps": 4,
        "batchSize": 8,
        "microBatchSize": 4,
        "maxLength": 256,
        "optimizer": {"learningRate": 0.003},
    }
    manifest = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "ranks"},
        "spec": {
            "seed": 3,
            "model": {"base": str(tiny_model), "precision": "fp32", "device": "cpu", "threads": 1},
            "data": {kind: {"train": str(tmp_path / f"{kind}.jsonl")} for kind in rows},
            "stages": [
                {"sft": {**sizes, "lora": None}},
                {"rewardModel": sizes},
                {"rewardModel": {**sizes, "name": "judge", "objective": "binary", "lora": None}},
                {"dpo": sizes},
                {"dpo": {**sizes, "lora": None}},
                {"ilql": {**sizes, "learnFrom": ["feedback"]}},
            ],
        },
    }
    run = load_model(AlignmentRun, manifest, "test")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.yaml").write_text(dump_yaml(run))
    for name in run.stage_names():
        run_stage(tmp_path / "one", name, [])
    run_on_two_ranks(run_stages, tmp_path / "two", "sft@2", folder=tmp_path, ends=-signal.SIGKILL)
    stages, left = ("sft", "reward-model~2"), 128 + signal.SIGTERM
    said = run_on_two_ranks(run_stages, tmp_path / "two", *stages, folder=tmp_path, ends=left)
    assert "sft  continuing from checkpoint-2" in said
    said = run_on_two_ranks(run_stages, tmp_path / "two", *run.stage_names(), folder=tmp_path)
    assert "reward-model  continuing from checkpoint-3" in said
    for name in run.stage_names():
        one, two = (
            [json.loads(line) for line in (tmp_path / folder / name / "metrics.jsonl").read_text().splitlines()]
            for folder in ("one", "two")
        )
        assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-4), name
        models = [tmp_path / folder / name / "model" for folder in ("one", "two")]
        weights = [load_file(model / "model.safetensors") | dict(read_heads(model)) for model in models]
        assert weights[0].keys() == weights[1].keys()
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, atol=1e-3, rtol=1e-3, msg=f"{name}: {key}")
