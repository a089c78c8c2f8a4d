"""What commands print with `--json`: one line, these shapes. The reference of commands is made from them.

A field is never taken away or given another meaning within a version of the manifest's API; further ones may come.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

import typer

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class RunLine:
    """One run of this machine."""

    name: str
    folder: str
    phase: str
    """Complete, Running, Stopped or Begun, or why it cannot be read."""
    stage: str
    """The stage that is at work or comes next; empty when all are complete."""
    done: int
    stages: int
    reward: float | None
    """Mean reward of the aligned model on held-out prompts, once it is evaluated."""
    rubric: float | None
    """Mean of the rubric's total, likewise."""
    age_seconds: float
    """Since the last change."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    """missing: something cannot work; note: something works less well, or only some of it."""
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Doctor:
    """All that was looked at."""

    findings: list[Finding]


@dataclass(frozen=True)
class StageState:
    """A stage of a run in a cluster."""

    name: str
    phase: str
    """Pending, Running, Succeeded, Failed."""
    reason: str = ""
    """Why it failed."""
    attempts: int = 0
    """Pods that failed."""


@dataclass(frozen=True)
class RunState:
    """A run in a cluster."""

    name: str
    namespace: str
    phase: str
    """Pending, Running, Suspended, Succeeded, RolledBack, Failed, Cancelled ..."""
    stage: str = ""
    """The stage at work, or the one that failed."""
    step: int | None = None
    total_steps: int | None = None
    reward: float | None = None
    kl: float | None = None
    message: str = ""
    stages: list[StageState] = field(default_factory=list)
    release: dict[str, Any] | None = None
    """As in the run's status."""

    @staticmethod
    def of(run: dict[str, Any]) -> RunState:
        """From the custom resource."""
        state, meta = run.get("status") or {}, run["metadata"]
        stages = [
            StageState(one["name"], one["phase"], one.get("reason", ""), one.get("attempts", 0))
            for one in state.get("stages", [])
        ]
        return RunState(
            meta["name"],
            meta.get("namespace", ""),
            state.get("phase", "Pending"),
            state.get("stage") or "",
            state.get("step"),
            state.get("totalSteps"),
            state.get("reward"),
            state.get("kl"),
            state.get("message") or "",
            stages,
            state.get("release"),
        )


@dataclass(frozen=True)
class Valid:
    """A manifest that can be run."""

    file: str
    name: str
    stages: list[str]
    """In their order."""
    steps: dict[str, int | None]
    """Optimizer steps, or rounds, by stage; null: it makes none, or how many is known only later."""
    memory_gib: dict[str, float | None]
    """Weights and optimizer states of a stage's processes, without activations, caches and libraries; null: not
    known."""
    seconds: float | None
    """What it will take, by earlier runs of the same stages on this machine; null: not known."""


@dataclass(frozen=True)
class Report:
    """A report that was drawn."""

    path: str
    """The HTML file."""
    summary: dict[str, Any]
    """`summary.json` of the run."""


@dataclass(frozen=True)
class Comparison:
    """A page that compares runs."""

    path: str
    """The HTML file."""
    runs: dict[str, dict[str, Any]]
    """Name of a run -> its summary, as `summary.json` has it."""


@dataclass(frozen=True)
class FormatLine:
    """A format that `steersman data import` knows."""

    name: str
    rows: str
    """Type of the rows that it becomes."""
    licence: str
    """Of the public data set; empty: none is known."""
    about: str


@dataclass(frozen=True)
class ProjectLine:
    """A labelling project."""

    name: str
    kind: str
    """compare, rank, rate or edit."""
    overlap: int
    """Labelers for each item."""
    items: int
    judgements: int


@dataclass(frozen=True)
class ReleaseLine:
    """A release of a data set."""

    name: str
    version: int
    rows: int
    made: str
    """ISO 8601."""
    good: bool
    """Its files are those that were written."""
    state: str
    """`good`, or what is wrong."""
    folder: str


@dataclass(frozen=True)
class Released:
    """What `steersman data release` did."""

    name: str
    version: int
    created: bool
    """False: nothing has changed since this version."""
    rows: int
    splits: dict[str, int]
    digest: str
    """SHA-256 over its files."""
    folder: str
    left_out: dict[str, int]
    """Reason -> rows."""
    replaced: dict[str, int]
    """Kind of personal data -> places."""
    empty_splits: list[str]


@dataclass(frozen=True)
class Imported:
    """What `steersman data import` did; `summary.json` in its folder has more."""

    format: str
    folder: str
    read: int
    written: int
    splits: dict[str, int]
    duplicates: int
    near_duplicates: int
    ids_made_unique: int
    ungrouped: int
    """Rows without the key of `--split-by`."""
    not_kept: dict[str, int]
    """Field without a place in the rows -> records that had it."""
    left_out: dict[str, int]
    """Reason -> records; `skipped.jsonl` has every one."""
    incomplete: list[str]
    """Files that ended before their end."""


@dataclass(frozen=True)
class Trained:
    """A release that a stage of a run was trained on."""

    stage: str
    release: str
    version: int


@dataclass(frozen=True)
class Deleted:
    """What `steersman data delete-customer` did."""

    customer: str
    items: int
    answers: int
    remembered: int
    """Conversations, proposed actions and kept results of the gateway."""
    new_versions: dict[str, int | None]
    """Data set -> its version without the data; null: no row is left."""
    withdrawn: list[str]
    """Releases whose files were erased."""
    models: list[dict[str, str]]
    """Trained on deleted data: model, run, release."""
    files: list[str]
    """Imported files whose owner must take the rows out."""


OUTPUTS: dict[str, Any] = {
    "runs": list[RunLine],
    "doctor": Doctor,
    "status": list[RunState],
    "validate": Valid,
    "report": Report,
    "compare": Comparison,
    "data formats": list[FormatLine],
    "data projects": list[ProjectLine],
    "data releases": list[ReleaseLine],
    "data release": Released,
    "data import": Imported,
    "data trained": list[Trained],
    "data delete-customer": Deleted,
    "data agreement": "every figure of the agreement page: judgements, questions, labelers, pairs, days",
    "data wins": "`judgements`; `win_rates` and `strengths` by model: estimate and interval",
    "eval": "model -> suite -> decoding -> figures; `knowledge` and `judges` where they were asked",
    "eval-live": "`answers`, then as `eval`",
    "eval-reward": "`bench`, `pairs`, `labelers`: figures with intervals, of those that were given",
}
"""Command -> the type of its line, or, of figures that nest by names of the user's, in words."""


def print_json(value: Any) -> None:
    """One line: dataclasses by their fields; a number that is not finite, which JSON cannot say, is null."""
    typer.echo(json.dumps(_plain(value)))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
