"""What `steersman validate` says a run will take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from local_helpers import manifest

from steersman.local.expected import count_parameters, expected_of
from steersman.testing.models import save_model_folder, tiny_llama


def prepared(run_dir: Path, base: Path, rows: int, precision: str = "fp32") -> None:
    """As `prepare` leaves a run's folder."""
    (run_dir / "data").mkdir()
    for kind in ("demonstrations", "preferences", "prompts"):
        (run_dir / "data" / f"{kind}.train.jsonl").write_text("{}\n" * rows)
    (run_dir / "prepared.json").write_text(json.dumps({"base": str(base), "precision": precision}))


def test_steps_are_those_of_options_and_rows(tmp_path: Path) -> None:
    prepared(tmp_path, tmp_path / "nowhere", rows=10)
    stages = [
        {"sft": {"batchSize": 4, "epochs": 2.5}},  # three batches a pass, the last with two rows
        {"rewardModel": {"batchSize": 4, "maxSteps": 5}},
        {"dpo": {"batchSize": 16}},
        {"evaluate": {}},
    ]
    needs = expected_of(manifest(stages=stages), tmp_path)
    assert {name: need.steps for name, need in needs.items()} == {
        "sft": 8,
        "reward-model": 5,
        "dpo": 1,
        "evaluate": None,
    }
    online = [{"sft": {}}, {"rewardModel": {}}, {"rl": {"steps": 7}}]
    assert expected_of(manifest(stages=online), tmp_path)["rl"].steps == 7
    sampling = [{"sft": {}}, {"rewardModel": {}}, {"rejectionSampling": {"rounds": 3}}]
    assert expected_of(manifest(stages=sampling), tmp_path)["rejection-sampling"].steps == 3
    assert all(need.memory_gib is None for need in needs.values()), "a model without safetensors"


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_memory_is_that_of_weights_and_optimizer(tmp_path: Path, precision: str, width: int) -> None:
    model = tiny_llama()
    base = save_model_folder(tmp_path / "base", model)
    stored = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    parameters = count_parameters(base)
    assert parameters == sum(stored.values())
    prepared(tmp_path, base, rows=10, precision=precision)
    stages = [{"sft": {"lora": None}}, {"rewardModel": {}}, {"rl": {}}, {"evaluate": {}}]
    services = {"policy": {"replicas": 2}, "reference": {"endpoints": ["elsewhere:50053"]}}
    needs = expected_of(manifest(stages=stages, services=services), tmp_path)
    per_parameter = {name: (need.memory_gib or 0) * 2**30 / parameters for name, need in needs.items()}
    assert per_parameter["sft"] == pytest.approx(16), "weight, gradient, two moments"
    assert per_parameter["reward-model"] == pytest.approx(4 + 16 * 0.005), "an adapter of rank 16"
    assert per_parameter["rl"] == pytest.approx(4 + 16 * 0.005 + 3 * width), "two policies and a reward model are here"
    assert per_parameter["evaluate"] == pytest.approx(3 * width)
