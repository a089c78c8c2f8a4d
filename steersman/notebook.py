"""`steersman.Run`: a run from Python, for notebooks: start, watch, metrics as data frames, samples, plots.

    run = Run.start("run.yaml")            on this machine; Run.submit("run.yaml") in the cluster
    run.watch()                            until it ends, with its progress
    run.metrics("rl").plot(x="step", y="reward")
    run.samples()

A local run is a process of its own, so that a kernel that restarts finds it again: `Run("runs/NAME")`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.errors import FailedPreconditionError, NotFoundError, SteersmanError, meant

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from steersman.cli.cluster import Cluster
    from steersman.config.manifest import AlignmentRun
    from steersman.report.schema import Evaluation

_OUTPUT = "notebook.log"


class Run:
    """A run in a folder of this machine."""

    def __init__(self, folder: str | Path) -> None:
        """Opens a run that is there, whoever started it.

        Raises:
            NotFoundError: the folder has no manifest.
        """
        self.folder = Path(folder).absolute()
        if not (self.folder / "manifest.yaml").is_file():
            raise NotFoundError(f"{self.folder} has no manifest.yaml; name the folder of a run, or use Run.start")
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, manifest: str | Path, *, folder: str | Path | None = None, overrides: Sequence[str] = ()) -> Run:
        """Begins a manifest as `steersman run` does, or goes on where it stopped; returns at once.

        Args:
            folder: of the run; `runs/NAME` by default.
            overrides: `spec.a.b=value`.

        Raises:
            ConfigError, DataError: the manifest is wrong.
        """
        from steersman.config.manifest import load_manifest
        from steersman.local import folder as folders

        path = Path(manifest).absolute()
        run = load_manifest(path, list(overrides))
        where = Path(folder or Path("runs") / run.metadata.name).absolute()
        command = [sys.executable, "-m", "steersman", "run", "-f", str(path), "--run-dir", str(where)]
        for override in overrides:
            command += ["--set", override]
        where.mkdir(parents=True, exist_ok=True)
        if not folders.manifest_path(where).is_file():
            folders.write_manifest(folders.resolve(run, where, path.parent), where)
        begun = cls(where)
        with (where / _OUTPUT).open("wb") as output:
            begun._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )
        return begun

    @staticmethod
    def submit(
        manifest: str | Path, *, overrides: Sequence[str] = (), namespace: str | None = None, context: str | None = None
    ) -> ClusterRun:
        """Hands a manifest to the cluster of the kubeconfig."""
        from steersman.cli.cluster import connect
        from steersman.config.base import apply_overrides, read_yaml
        from steersman.config.manifest import load_manifest

        path = Path(manifest)
        run = load_manifest(path, list(overrides))
        cluster = connect(context, namespace or run.metadata.namespace)
        document = apply_overrides(read_yaml(path), list(overrides))
        document["metadata"]["namespace"] = cluster.namespace
        cluster.submit(document)
        return ClusterRun(cluster, run.metadata.name)

    @staticmethod
    def in_cluster(name: str, *, namespace: str | None = None, context: str | None = None) -> ClusterRun:
        """Opens a run of the cluster."""
        from steersman.cli.cluster import connect

        return ClusterRun(connect(context, namespace), name)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}): {self.phase}"

    @property
    def manifest(self) -> AlignmentRun:
        """As it was resolved."""
        from steersman.config.manifest import load_manifest

        return load_manifest(self.folder / "manifest.yaml")

    @property
    def stages(self) -> dict[str, str]:
        """Stage to `complete`, `begun` or `to do`."""
        from steersman.config.stages import read_complete

        def state(name: str) -> str:
            if read_complete(self.folder, name) is not None:
                return "complete"
            return "begun" if (self.folder / name).is_dir() else "to do"

        return {name: state(name) for name in self.manifest.stage_names()}

    @property
    def phase(self) -> str:
        """`Running`, `Complete`, `Failed` (of a run that this object started) or `Stopped`."""
        if self._process is not None and self._process.poll() is None:
            return "Running"
        if all(state == "complete" for state in self.stages.values()):
            return "Complete"
        if self._process is not None:
            return "Failed" if self._process.returncode else "Stopped"
        from steersman.local.folder import is_held

        return "Running" if is_held(self.folder) else "Stopped"

    def watch(self, show: Callable[[str], None] = print, *, seconds: float = 1.0) -> Run:
        """Shows the progress until the run ends.

        Args:
            show: gets every line.
            seconds: between two looks.

        Raises:
            FailedPreconditionError: the run failed; the message is its last sentence.
        """
        shown = 0
        while True:
            running = self.phase == "Running"
            lines = self.log().splitlines(keepends=True)
            whole = len(lines) if not running else sum(line.endswith("\n") for line in lines)
            for line in lines[shown:whole]:
                show(line.rstrip("\n"))
            shown = whole
            if not running:
                break
            time.sleep(seconds)
        if self.phase == "Failed":
            last = next((line for line in reversed(self.log().splitlines()) if line.strip()), "it says nothing")
            raise FailedPreconditionError(f"the run failed: {last}; its logs lie in {self.folder / 'logs'}")
        return self

    def log(self) -> str:
        """What the run said so far; empty of one that was started elsewhere."""
        path = self.folder / _OUTPUT
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def stop(self) -> None:
        """Ends a run that this object started, as Ctrl-C does: it continues where it was when it is started again."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def metrics(self, stage: str | None = None) -> DataFrame:
        """A row a step: `stage`, `step` and every metric; of one stage or of all that trained."""
        from steersman.report.report import stage_metrics

        if stage is not None and stage not in self.stages:
            raise NotFoundError(
                f"the run has no stage {stage}; it has {', '.join(self.stages)}{meant(stage, self.stages)}"
            )
        rows = [
            {"stage": name, **row}
            for name, found in stage_metrics(self.folder).items()
            if stage is None or name == stage
            for row in found
        ]
        return _frame(rows, ["stage", "step"])

    def evaluation(self) -> Evaluation:
        """The newest one; NotFoundError where there is none yet."""
        from steersman.report.schema import read_evaluation_of

        return read_evaluation_of(self.folder)

    def samples(self) -> DataFrame:
        """A row an answer: `model`, `prompt_id`, `question`, `answer`, `reward`, `kl`, `tokens`, `finish_reason`, and
        each criterion of the rubric."""
        rows = [
            {
                "model": model, "prompt_id": one.prompt_id, "question": one.prompt[-1].content, "answer": one.answer,
                "reward": one.reward, "kl": one.kl, "tokens": one.length, "finish_reason": one.finish_reason,
                **{f"rubric_{name}": value for name, value in one.rubric.items()},
            }
            for model, samples in self.evaluation().models.items()
            for one in samples
        ]  # fmt: skip
        return _frame(rows, ["model", "prompt_id"])

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers of the evaluation, intervals as [estimate, low, high]; empty where there are none yet."""
        path = self.folder / "summary.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found

    @property
    def report(self) -> Path:
        """The HTML report; `IPython.display.HTML(filename=run.report)` shows it."""
        path = self.folder / "report" / "report.html"
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist yet; it is drawn after the stage evaluate")
        return path

    def plot(self, stage: str) -> Figure:
        """The training curves of a stage."""
        return _curves(stage, self.metrics(stage))

    def plot_rewards(self) -> Figure:
        """Rewards of every model, and the change of each prompt."""
        from steersman.report.plots import reward_distributions

        return reward_distributions(self.evaluation())


class ClusterRun:
    """A run of a cluster. Its files lie in the cluster; metrics come from the stages' logs."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self.name = cluster, name

    def __repr__(self) -> str:
        return f"ClusterRun({self.name!r}): {self.phase}"

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self._cluster.get(self.name).get("status") or {}
        return found

    @property
    def phase(self) -> str:
        """As the controller calls it, `Pending` before it has seen the run."""
        return str(self.status.get("phase", "Pending"))

    @property
    def stages(self) -> dict[str, str]:
        """Stage to its phase."""
        return {stage["name"]: stage["phase"] for stage in self.status.get("stages", [])}

    def watch(self, show: Callable[[str], None] = print, *, seconds: float = 2.0) -> ClusterRun:
        """Shows the progress until the run ends.

        Raises:
            FailedPreconditionError: it did not succeed.
        """
        from steersman.cli.cluster import follow

        state = follow(self._cluster, self.name, show, seconds)
        if state["phase"] != "Succeeded":
            raise FailedPreconditionError(f"the run ended as {state['phase']}: {state.get('message', '')}")
        return self

    def log(self, stage: str, lines: int = 200) -> str:
        """End of a stage's log."""
        return self._cluster.logs(self.name, stage, lines)

    def metrics(self, stage: str) -> DataFrame:
        """A row a step, from the events in the stage's log."""
        rows = []
        for line in self.log(stage, 100_000).splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, Mapping) and event.get("event") == "progress":
                rows.append({key: value for key, value in event.items() if key not in ("event", "seconds_left")})
        return _frame(rows, ["stage", "step"])

    def plot(self, stage: str) -> Figure:
        """The training curves of a stage."""
        return _curves(stage, self.metrics(stage))

    def stop(self) -> None:
        """Asks the controller to end it; what is written stays."""
        self._cluster.annotate(self.name, {"steersman.dev/cancel": "true"})


def _curves(stage: str, metrics: DataFrame) -> Figure:
    from steersman.report.plots import training_curves

    figure = training_curves(stage, metrics.to_dict("records"))
    if figure is None:
        raise NotFoundError(f"stage {stage} has no curves yet")
    return figure


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> DataFrame:
    try:
        from pandas import DataFrame
    except ImportError:
        raise SteersmanError("data frames need pandas; pip install 'steersman[notebook]'") from None
    return DataFrame(list(rows)) if rows else DataFrame(columns=list(columns))
