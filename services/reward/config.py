"""Configuration of the reward service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from steersman.config.base import FrozenModel
from steersman.rpc.server import ServerConfig


class ScorerConfig(FrozenModel):
    name: str
    """Name under which values are reported."""
    kind: Literal["model", "verifiable"]
    """A trained model, or a registered function."""
    weight: float = 1.0
    """Weight in the reward; 0: reported only."""
    path: Path | None = None
    """Folder of the model."""
    type: str | None = None
    """Name that the verifiable reward is registered under; None: `name`."""
    python: str | None = None
    """Somebody's own function, `module:function` or `path/file.py:function`, in its place."""
    options: dict[str, Any] = {}
    """Options of the verifiable reward."""

    @model_validator(mode="after")
    def _check(self) -> ScorerConfig:
        if self.kind == "model" and self.path is None:
            raise ValueError("path is missing; a scorer of kind model needs its folder")
        return self


class RewardConfig(ServerConfig):
    scorers: Annotated[list[ScorerConfig], Field(min_length=1)]
    """What scores; the reward is their weighted sum."""
    port: Annotated[int, Field(ge=0, le=65535)] = 50052
    """RewardService."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; `auto` measures on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0: all cores."""
    batch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Tokens of a forward pass."""
    merge_requests: bool = True
    """Batch requests of several callers together; off: results are bit-equal whatever else arrives."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> RewardConfig:
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) != len(names):
            raise ValueError("scorers: two have the same name; give each its own")
        return self
