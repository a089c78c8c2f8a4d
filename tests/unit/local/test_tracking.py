"""What a run's folder holds reaches MLflow and TensorBoard through their own libraries, while the run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from steersman.cli import app
from steersman.config.base import dump_yaml, load_model
from steersman.config.manifest import AlignmentRun
from steersman.config.stages import mark_complete
from steersman.errors import ConfigError
from steersman.local import process
from steersman.local.tracked import SWITCH, followed
from steersman.tracking import Follower
from steersman.tracking import sinks as trackers


def make_run(folder: Path, **tracking: Any) -> tuple[AlignmentRun, Path]:
    """A run whose SFT goes on."""
    run_dir = folder / "first"
    manifest = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "first", "labels": {"team": "shop"}},
        "spec": {
            "data": {"demonstrations": {"train": "d.jsonl"}},
            "stages": [{"sft": {"batchSize": 4, "microBatchSize": 2}}],
            "tracking": tracking,
        },
    }
    run = load_model(AlignmentRun, manifest, "test")
    (run_dir / "sft").mkdir(parents=True)
    (run_dir / "manifest.yaml").write_text(dump_yaml(run))
    (run_dir / "sft" / "config.yaml").write_text(dump_yaml(run.spec.stages[0].spec))
    rows(run_dir, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "accuracy": None}], torn='{"step": 3')
    return run, run_dir


def rows(run_dir: Path, values: list[dict[str, Any]], torn: str = "") -> None:
    (run_dir / "sft" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values) + torn)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MlflowClient, str]:
    """A run that was followed to its end, with what MLflow knows of it."""
    folder = tmp_path_factory.mktemp("tracked")
    run, run_dir = make_run(folder, tensorboard=True)
    follower = Follower(run, run_dir)
    follower.look()
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("steersman")
    assert experiment is not None
    (going,) = client.search_runs([experiment.experiment_id])
    assert going.info.status == "RUNNING"
    assert [point.value for point in client.get_metric_history(going.info.run_id, "sft/loss")] == [2.0, 1.5]
    # The process ends, another goes on where it was.
    rows(run_dir, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 1.0}])
    (run_dir / "d.jsonl").write_text("{}\n")
    mark_complete(run, "sft", run_dir)
    (run_dir / "summary.json").write_text(json.dumps({"reward": {"sft": [0.5, 0.4, 0.6]}, "seed": 17}))
    Follower(run, run_dir).close()
    return run_dir, client, going.info.run_id


def test_mlflow_has_parameters_curves_and_artifacts_in_an_embedded_database(
    tracked: tuple[Path, MlflowClient, str],
) -> None:
    _, client, identity = tracked
    found = client.get_run(identity)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "first"
    assert found.data.tags["team"] == "shop"
    assert found.data.params["sft.batchSize"] == "4"
    assert found.data.params["seed"] == "17"
    history = client.get_metric_history(identity, "sft/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.5), (3, 1.0)]
    assert found.data.metrics["summary/reward.sft"] == 0.5
    assert found.data.metrics["summary/reward.sft.low"] == 0.4
    assert {item.path for item in client.list_artifacts(identity)} == {"manifest.yaml", "summary.json", "sft"}
    assert {item.path for item in client.list_artifacts(identity, "sft")} == {"sft/config.yaml"}


def test_tensorboard_has_the_same_curve(tracked: tuple[Path, MlflowClient, str]) -> None:
    run_dir, _, _ = tracked
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("sft/loss")] == [(1, 2.0), (2, 1.5), (3, 1.0)]


@pytest.mark.timeout(900)
def test_even_the_shortest_run_is_followed_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, run_dir = make_run(tmp_path)
    with followed(run, run_dir, os.environ):
        pass
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("steersman")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.metrics["sft/loss"] == 1.5


def test_a_run_that_was_made_without_trackers_is_sent_later(tmp_path: Path) -> None:
    _, run_dir = make_run(tmp_path, enabled=False)
    database = tmp_path / "other.db"
    done = CliRunner().invoke(app, ["track", str(run_dir), "--mlflow", f"sqlite:///{database}"])
    assert done.exit_code == 0, done.output
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("steersman")
    assert experiment is not None
    (sent,) = client.search_runs([experiment.experiment_id])
    assert sent.data.metrics["sft/loss"] == 1.5
    assert sent.info.status == "FAILED", "its stage is not complete"


def test_one_field_or_the_environment_switches_tracking_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "start", lambda *_, **__: pytest.fail("a follower was started"))
    monkeypatch.delenv(SWITCH, raising=False)
    run, run_dir = make_run(tmp_path, enabled=False)
    with followed(run, run_dir, {}):
        pass
    run = run.model_copy(update={"spec": run.spec.model_copy(update={"tracking": type(run.spec.tracking)()})})
    with followed(run, run_dir, {}, part=True):  # a pod's stage has no database of its own
        pass
    monkeypatch.setenv(SWITCH, "off")
    with followed(run, run_dir, {}):
        pass


def test_a_tracker_that_is_asked_for_and_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    run, run_dir = make_run(tmp_path, wandb="shop")
    with pytest.raises(ConfigError, match=r"asks for wandb, which is not installed; pip install 'steersman\[wandb\]'"):
        Follower(run, run_dir)
    run, run_dir = make_run(tmp_path / "other")
    Follower(run, run_dir).close()  # nobody asked for MLflow by name


def test_wandb_gets_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run, run_dir = make_run(tmp_path, mlflow=None, wandb="shop")
    Follower(run, run_dir).close()
    assert list((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
