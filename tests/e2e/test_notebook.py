"""`steersman.Run`: the tutorial's notebook is executed on a tiny model; a cluster's run speaks the same language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

import steersman
from steersman.errors import ConfigError, FailedPreconditionError, NotFoundError
from steersman.notebook import ClusterRun
from steersman.testing.models import save_model_folder, tiny_llama

pytestmark = pytest.mark.timeout(1800)


def manifest(folder: Path) -> Path:
    save_model_folder(folder / "base", tiny_llama())
    document = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"base": "base", "precision": "fp32", "threads": 1},
            "services": {"startTimeoutSeconds": 1800},
            "data": {"demo": {"demonstrations": 16, "preferences": 16, "prompts": 12, "heldoutPrompts": 8}},
            "stages": [
                {"sft": {"maxSteps": 2, "batchSize": 4, "microBatchSize": 4}},
                {"rewardModel": {"maxSteps": 2, "batchSize": 4, "microBatchSize": 4}},
                {"evaluate": {"generation": {"maxNewTokens": 8}, "checks": [{"name": "demo-rubric"}]}},
            ],
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_the_notebook_of_the_tutorial_runs(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_TUTORIAL", str(manifest(tmp_path)))
    notebook = nbformat.read(repo_root / "docs" / "tutorials" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(
        notebook, timeout=1500, startup_timeout=300, kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )  # fmt: skip
    client.execute()
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "sft  complete after" in outputs
    assert "image/png" in outputs
    assert "'Complete'" in outputs
    run = steersman.Run(tmp_path / "runs" / "tiny")
    assert run.phase == "Complete"
    assert run.stages == {"sft": "complete", "reward-model": "complete", "evaluate": "complete"}
    metrics = run.metrics()
    assert set(metrics["stage"]) == {"sft", "reward-model"}, "what trained; samples are what was evaluated"
    assert set(run.metrics("sft")["step"]) == {1, 2}
    samples = run.samples()
    assert len(samples) == 2 * 8
    assert set(samples["model"]) == {"base", "sft"}
    assert {"question", "answer", "reward", "rubric_total"} <= set(samples.columns)
    with pytest.raises(NotFoundError, match="no stage rl; it has sft, reward-model, evaluate"):
        run.metrics("rl")


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no manifest"):
        steersman.Run(tmp_path)
    path = manifest(tmp_path)
    with pytest.raises(ConfigError):
        steersman.Run.start(path, overrides=["spec.seed=-1"], folder=tmp_path / "run")
    run = steersman.Run.start(
        path, overrides=["spec.data={demonstrations: {train: nowhere.jsonl}}", "spec.stages=[{sft: {}}]"],
        folder=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(FailedPreconditionError, match=r"nowhere\.jsonl"):
        run.watch(lambda _: None, seconds=0.1)
    assert run.phase == "Failed"
    with pytest.raises(NotFoundError, match=r"has no evaluation\.json; run a manifest with an evaluate stage"):
        run.samples()


class Api:
    """What the API server says of a run, look after look."""

    def __init__(self) -> None:
        stages = [{"name": "sft", "phase": "Running"}]
        running = {"phase": "Running", "stage": "sft", "step": 1, "totalSteps": 2, "stages": stages}
        self.looks: list[dict[str, Any]] = [{}, running, {"phase": "Succeeded", "stages": stages}]
        self.annotated: dict[str, str] = {}

    def get(self, name: str) -> dict[str, Any]:
        status = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return {"metadata": {"name": name}, "status": status}

    def logs(self, name: str, stage: str, lines: int) -> str:
        rows = [{"event": "progress", "stage": stage, "step": n, "total": 2, "loss": 2.0 / n} for n in (1, 2)]
        return "torch says hello\n" + "".join(json.dumps(row) + "\n" for row in [{"event": "note"}, *rows])

    def annotate(self, name: str, annotations: dict[str, str]) -> None:
        self.annotated |= annotations


def test_a_run_of_the_cluster_is_watched_and_has_metrics() -> None:
    api: Any = Api()
    run = ClusterRun(api, "tiny")
    shown: list[str] = []
    run.watch(shown.append, seconds=0.0)
    assert shown[0] == "tiny  Pending"
    assert shown[1].startswith("tiny  Running  sft 1/2")
    assert run.phase == "Succeeded"
    frame = run.metrics("sft")
    assert list(frame["step"]) == [1, 2]
    assert list(frame["loss"]) == [2.0, 1.0]
    assert run.plot("sft").axes
    run.stop()
    assert api.annotated == {"steersman.dev/cancel": "true"}
