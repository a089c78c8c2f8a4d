"""`steersman run` on a tiny model up to a released folder that `steersman serve` would serve."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from steersman.config.manifest import load_manifest
from steersman.local.executor import run_manifest
from steersman.local.folder import resolve
from steersman.local.serve import find_model
from steersman.testing.models import save_model_folder, tiny_llama


def test_a_run_with_a_release_stage(tmp_path: Path):
    base = save_model_folder(tmp_path / "base", tiny_llama())
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    (tmp_path / "demos.jsonl").write_text((json.dumps(row) + "\n") * 2)
    document = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"base": str(base), "device": "cpu", "precision": "fp32"},
            "data": {"demonstrations": {"train": "demos.jsonl"}},
            "stages": [{"sft": {"maxSteps": 1, "batchSize": 2, "lora": {"rank": 2}}}, {"release": {}}],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    run_dir = tmp_path / "runs" / "tiny"
    run = resolve(load_manifest(tmp_path / "run.yaml"), run_dir, tmp_path)
    run_manifest(run, run_dir)
    pointer = json.loads((run_dir / "release" / "release.json").read_text())
    assert pointer["model"] == str(run_dir / "release" / "model")
    assert (run_dir / "release" / "model" / "README.md").is_file()
    assert not (run_dir / "release" / "model" / "adapter_config.json").exists()
    served, name, _ = find_model(run_dir)
    assert name == "tiny"
    weights = "model.safetensors"
    assert (served / weights).read_bytes() == (run_dir / "release" / "model" / weights).read_bytes()
    run_manifest(run, run_dir)
