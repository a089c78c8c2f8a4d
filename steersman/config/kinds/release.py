"""Publication."""

from __future__ import annotations

import itertools
from typing import Annotated

from pydantic import Field, model_validator

from steersman.config.base import FrozenModel, NonNegative, NonNegativeFloat, PositiveFloat
from steersman.config.kinds.registry import StageOptions, stage


class Canary(FrozenModel):
    """Limits of a canary. Of candidates as good as the champion at most 5% are ever taken back, and of those worse by
    `maxThumbsDownIncrease` at most 5% promoted, however long it is watched."""

    steps: Annotated[list[Annotated[int, Field(gt=0, le=100)]], Field(min_length=1)] = [10, 50, 100]
    """Percent of the traffic, step by step, rising."""
    minutes_per_step: PositiveFloat = 30.0
    """Time to watch before the next step."""
    min_feedback: NonNegative = 20
    """Judged conversations of the candidate without which no step is left."""
    max_thumbs_down_increase: Annotated[float, Field(gt=0)] = 0.05
    """Promotes only when judgements exclude that the candidate's share of thumbs down exceeds the champion's by so
    much; takes back when they show that it exceeds it at all. 1: judgements are not needed."""
    max_error_rate: NonNegativeFloat = 0.02
    """Takes back when more requests fail, and more than the champion's."""
    max_latency_ratio: PositiveFloat = 1.5
    """Takes back when the median latency exceeds the champion's by this factor."""
    manual_approval: bool = False
    """Wait for the annotation `steersman.dev/approve: "true"` before the first step."""

    @model_validator(mode="after")
    def _steps_leave_something_to_compare(self) -> Canary:
        if any(later <= earlier for earlier, later in itertools.pairwise(self.steps)):
            raise ValueError(f"steps must rise, but they are {self.steps}")
        if self.steps[0] == 100 and self.max_thumbs_down_increase < 1:
            raise ValueError("steps: the first gives all traffic to the candidate, which leaves nothing to compare")
        return self


class Override(FrozenModel):
    """Releases a model in spite of gates that it did not pass; stands in the model card."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]
    """Who decides so."""
    reason: Annotated[str, Field(min_length=1, max_length=2000, pattern=r"\S")]
    """Why."""
    gates: list[str] = []
    """Gates that may fail, as `reward` or `criteria.polite`; empty: all."""

    def covers(self, gate: str) -> bool:
        """Whether a failed gate is let through."""
        return not self.gates or gate in self.gates or gate.partition(".")[0] in self.gates


@stage("release")
class ReleaseStage(StageOptions):
    """Writes the merged model, registers it, and in a cluster releases it step by step."""

    title = "Publication."
    runner = "training.release:run_release"

    override: Override | None = None
    """None: a gate that is not passed blocks the release."""

    canary: Canary | None = None
    """None: publish at once."""
    inference_service: str | None = None
    """KServe InferenceService that serves the bot."""
    deployment: str | None = None
    """Without KServe: Deployment of the policy service behind our gateway, for example steersman-policy."""

    @model_validator(mode="after")
    def _one_endpoint(self) -> ReleaseStage:
        if self.inference_service is not None and self.deployment is not None:
            raise ValueError("a release has an inferenceService or a deployment, not both")
        return self
