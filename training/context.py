"""What a stage is given: where to read, where to write, and whom to tell about its progress."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from steersman.config.manifest import AlignmentRun, RunSpec
from steersman.errors import ConfigError


class Reporter(Protocol):
    """Receives progress. Called from the training loop, so it must return quickly."""

    def step(self, step: int, total: int, **metrics: float) -> None:
        """`step` of `total` optimizer steps is done."""

    def note(self, text: str) -> None:
        """One line about what happens now."""

    def activity(self, text: str) -> None:
        """What is being done; shown when nothing else has been for a while."""

    def rows_in(self, metrics_path: Path) -> AbstractContextManager[None]:
        """Inside, the metrics of steps go to another file: those of a part that counts its steps anew."""


@dataclass(frozen=True)
class DataFiles:
    """JSONL files of one kind of data."""

    train: Path
    validation: Path | None = None
    heldout: Path | None = None


@dataclass(frozen=True)
class StageContext:
    run: AlignmentRun
    run_dir: Path
    stage_dir: Path
    """Folder of this stage; checkpoints and artifacts go there."""
    name: str
    """Unique name of the stage in the run, for example `sft` or `reward-model-2`."""
    spec: RunSpec
    base_model: Path
    """Folder of the run's base model."""
    policy_model: Path
    """Plain folder of the newest policy: of the stage before that trained one, otherwise the base model."""
    seed: int
    reporter: Reporter
    device: str
    """`cpu` or `cuda`."""
    precision: Literal["fp32", "bf16"]
    """Arithmetic of matrix products; weights stay fp32."""
    cache_dir: Path
    """Where prepared models are kept."""
    sft_model: Path | None = None
    """Plain folder of the newest SFT stage."""
    data: Mapping[str, DataFiles] = field(default_factory=dict)
    """Files by field of `DataSpec`, for example `preferences`."""

    @property
    def checkpoints(self) -> Path:
        """Folder for the stage's checkpoints; it goes when the stage is complete."""
        return self.stage_dir / "checkpoints"

    def files(self, kind: str) -> DataFiles:
        try:
            return self.data[kind]
        except KeyError:
            raise ConfigError(f"stage {self.name} needs data.{kind}; add it or use data.demo") from None
