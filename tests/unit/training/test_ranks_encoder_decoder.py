"""Two ranks train an encoder-decoder as one does: both stacks are sharded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks_encoder_decoder_worker import CASES, curves, write_curves
from safetensors.torch import load_file
from test_dpo_kto import pairs
from two_ranks import run_on_two_ranks

from steersman.config.base import dump_yaml, load_model
from steersman.config.manifest import AlignmentRun
from steersman.testing.models import save_model_folder, tiny_t5, tiny_tokenizer
from training.parallel import Ranks
from training.stage import run_stage


def test_two_ranks_train_an_encoder_decoder_as_one_does(tmp_path: Path) -> None:
    """RL with all weights (PPO) and with an adapter (NLPO), then SFT."""
    t5 = save_model_folder(tmp_path / "t5", tiny_t5(seed=3), tiny_tokenizer(chat_template=None))
    rows = [{"messages": [*row["prompt"], *row["chosen"]]} for row in pairs(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = {"maxSteps": 2, "batchSize": 8, "microBatchSize": 2, "optimizer": {"learningRate": 0.003}, "lora": None}
    spec = {
        "model": {"base": str(t5), "precision": "fp32", "device": "cpu", "threads": 1},
        "data": {"demonstrations": {"train": str(tmp_path / "rows.jsonl")}},
        "stages": [{"sft": sft}],
    }
    head = {"apiVersion": "steersman.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": "ranks"}}
    run = load_model(AlignmentRun, {**head, "spec": spec}, "test")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.yaml").write_text(dump_yaml(run))

    run_on_two_ranks(write_curves, t5, tmp_path / "two", tmp_path / "two.json", folder=tmp_path)
    one, two = curves(t5, tmp_path, Ranks()), json.loads((tmp_path / "two.json").read_text())
    assert set(one) == set(two) == set(CASES)
    for name, steps in one.items():
        assert abs(steps[0]["policy_loss"] - steps[-2]["policy_loss"]) > 1e-3, name
        for step, (expected, found) in enumerate(zip(steps, two[name], strict=True), start=1):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), (name, step)

    run_stage(tmp_path / "one", "sft", [])
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "sft/metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    weights = [load_file(tmp_path / name / "sft/model/model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-3, rtol=1e-3, msg=key)
