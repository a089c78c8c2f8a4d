"""Where a run is sent: one class a tracker, each through its own library. They are imported when one is opened."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from steersman.config.manifest import AlignmentRun, Tracking
from steersman.errors import ConfigError

EMBEDDED = "embedded"
TRACKING_URI = "MLFLOW_TRACKING_URI"
"""MLflow's own variable; it stands for `embedded`."""
_MOST_PARAMS, _LONGEST_VALUE = 100, 6000
"""MLflow's limits of one request, and of a parameter."""


class Sink(Protocol):
    """One tracker. Names of metrics are `stage/name`."""

    def params(self, values: Mapping[str, str]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def artifact(self, path: Path, folder: str) -> None: ...
    def close(self, status: str) -> None:
        """Args:
        status: `FINISHED`, `FAILED`, or `RUNNING` where another process goes on with the run."""


def open_sinks(run: AlignmentRun, run_dir: Path, known: dict[str, str]) -> list[Sink]:
    """The trackers of `spec.tracking`.

    Args:
        known: ids of the run by tracker, of an earlier process; new ones are added.

    Raises:
        ConfigError: the manifest asks for a tracker whose library is not installed.
    """
    spec = run.spec.tracking
    sinks: list[Sink] = []
    if spec.mlflow is not None and _has("mlflow", asked=spec.mlflow != EMBEDDED):
        sinks.append(MlflowSink(spec, run, run_dir, known))
    if spec.tensorboard and _has("tensorboard", asked=True):
        sinks.append(TensorBoardSink(run_dir / "tensorboard"))
    if spec.wandb is not None and _has("wandb", asked=True):
        sinks.append(WandbSink(spec.wandb, run, run_dir, known))
    return sinks


def _has(library: str, *, asked: bool) -> bool:
    found = importlib.util.find_spec(library) is not None
    if asked and not found:
        extra = "wandb" if library == "wandb" else "tracking"
        raise ConfigError(f"spec.tracking asks for {library}, which is not installed; pip install 'steersman[{extra}]'")
    return found


def mlflow_url(spec: Tracking, run_dir: Path) -> str:
    """The server, or a database beside the run's folder, which all runs there share."""
    if spec.mlflow not in (None, EMBEDDED):
        return str(spec.mlflow)
    return os.environ.get(TRACKING_URI) or f"sqlite:///{run_dir.parent / 'mlflow.db'}"


class MlflowSink:
    """One MLflow run for the whole `AlignmentRun`: its page shows the curves of every stage."""

    def __init__(self, spec: Tracking, run: AlignmentRun, run_dir: Path, known: dict[str, str]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._param = Metric, Param
        url = mlflow_url(spec, run_dir)
        self._client = MlflowClient(url)
        experiment = self._client.get_experiment_by_name(spec.experiment)
        if experiment is None:
            place = (run_dir.parent / "mlartifacts").as_uri() if url.startswith("sqlite:") else None
            identity = self._client.create_experiment(spec.experiment, artifact_location=place)
        else:
            identity = experiment.experiment_id
        if "mlflow" in known and known.get("mlflow_url") == url:
            self._run = known["mlflow"]
            self._client.update_run(self._run, "RUNNING")
        else:
            tags = {"steersman.folder": str(run_dir), **run.metadata.labels}
            self._run = self._client.create_run(identity, run_name=run.metadata.name, tags=tags).info.run_id
            known |= {"mlflow": self._run, "mlflow_url": url}

    def params(self, values: Mapping[str, str]) -> None:
        have = self._client.get_run(self._run).data.params
        new = [
            self._param(_name(key), value[:_LONGEST_VALUE]) for key, value in values.items() if _name(key) not in have
        ]
        for start in range(0, len(new), _MOST_PARAMS):
            self._client.log_batch(self._run, params=new[start : start + _MOST_PARAMS])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, metrics=[self._metric(_name(key), value, now, step) for key, value in values.items()]
        )

    def artifact(self, path: Path, folder: str) -> None:
        self._client.log_artifact(self._run, str(path), folder or None)

    def close(self, status: str) -> None:
        if status != "RUNNING":
            self._client.set_terminated(self._run, status)


def _name(key: str) -> str:
    """What MLflow takes: letters, digits, `_-./` and spaces."""
    return re.sub(r"[^\w./ -]", "_", key)[:250]


class TensorBoardSink:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))

    def params(self, values: Mapping[str, str]) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        lines = "\n".join(f"| {key} | {value} |" for key, value in values.items())
        summary = text_pb("parameters", f"| field | value |\n|---|---|\n{lines}")
        self._writer.add_event(self._event(wall_time=time.time(), step=0, summary=summary))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        rows = [self._summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=rows)))
        self._writer.flush()

    def artifact(self, path: Path, folder: str) -> None:
        """TensorBoard has no artifacts; they lie beside its folder."""

    def close(self, status: str) -> None:
        self._writer.close()


class WandbSink:
    """One Weights & Biases run; `WANDB_MODE=offline` keeps it in the run's folder."""

    def __init__(self, project: str, run: AlignmentRun, run_dir: Path, known: dict[str, str]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=project, name=run.metadata.name, id=known.get("wandb"), resume="allow", dir=str(run_dir),
            tags=[f"{key}:{value}" for key, value in run.metadata.labels.items()],
        )  # fmt: skip
        known["wandb"] = self._run.id
        self._stages: set[str] = set()

    def params(self, values: Mapping[str, str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for stage in {key.partition("/")[0] for key in values} - self._stages:
            # Every stage counts its own steps, which wandb's one global step cannot.
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        steps = {f"{key.partition('/')[0]}/step": step for key in values}
        self._run.log({**values, **steps})

    def artifact(self, path: Path, folder: str) -> None:
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status != "FAILED" else 1)
