"""The status of an AlignmentRun: what the controller writes and people read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from services.controller.turns import Turn
from steersman.canary import Evidence
from steersman.config.base import FrozenModel

Phase = Literal[
    "Pending",
    "Running",
    "Suspended",
    "AwaitingApproval",
    "Releasing",
    "Succeeded",
    "RolledBack",
    "Failed",
    "Cancelled",
]
TERMINAL: tuple[Phase, ...] = ("Succeeded", "RolledBack", "Failed", "Cancelled")

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
"""RFC 3339, UTC."""


class Condition(FrozenModel):
    """As `metav1.Condition`."""

    type: str
    """Valid, Progressing, Complete or Released."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: str
    """One word in CamelCase for machines."""
    message: str = ""
    """One sentence for people."""
    observed_generation: int = 0
    """Generation of the spec that this was said about."""
    last_transition_time: Time
    """When `status` changed last."""


class StageStatus(FrozenModel):
    name: str
    """Name of the stage, as `steersman run` names its folder."""
    phase: Literal["Pending", "Running", "Succeeded", "Failed"] = "Pending"
    """Where the stage is."""
    attempts: int = 0
    """Pods that failed so far."""
    start_time: Time | None = None
    """When its Job was created."""
    completion_time: Time | None = None
    """When it ended."""
    exit_code: int | None = None
    """Exit code of the last failed pod."""
    reason: str | None = None
    """Why it failed, one word."""
    message: str | None = None
    """Why it failed, one sentence."""
    log: str | None = None
    """Last lines of the failed pod's log."""


class ReleaseStatus(FrozenModel):
    candidate: str
    """Name of the canary predictor."""
    model: str
    """Storage URI of the released model."""
    previous_model: str | None = None
    """Storage URI of the model that served before."""
    step: int = -1
    """Index into the canary's steps; -1 before the first."""
    percent: int = 0
    """Traffic of the candidate."""
    step_start_time: Time | None = None
    """When the candidate was given this percentage."""
    ready_time: Time | None = None
    """When the candidate was ready at this percentage."""
    counted_since: Time | None = None
    """When the candidate was ready for the first time; signals count from here."""
    evidence: Evidence = Evidence()
    """What both variants showed since then, and what it is worth."""
    promoting: bool = False
    """The candidate has passed and is becoming the champion."""
    decision: Literal["Promoted", "RolledBack"] | None = None
    """How it ended."""
    reason: str | None = None
    """Why."""


class RunStatus(FrozenModel):
    observed_generation: int = 0
    """Generation of the spec that this status is about."""
    phase: Phase = "Pending"
    """Where the run is."""
    message: str = ""
    """What it does or waits for, one sentence."""
    stage: str | None = None
    """The running stage, or the one that failed."""
    step: int | None = None
    """Optimizer step of the running stage."""
    total_steps: int | None = None
    """Steps that the running stage has."""
    reward: float | None = None
    """Mean reward of the last step that reported one."""
    kl: float | None = None
    """KL to the reference of the last step that reported one, nats a sample."""
    tokens_per_second: float | None = None
    """Generation speed as last reported."""
    start_time: Time | None = None
    """When the run began."""
    completion_time: Time | None = None
    """When it ended."""
    suspend_time: Time | None = None
    """Since when it is held."""
    suspended_seconds: int = 0
    """How long it was held before; this time does not count for activeDeadlineSeconds."""
    blocked_since: Time | None = None
    """Since when the stage is held up by what does not mend itself."""
    turn: Turn | None = None
    """Of a stage with several pods: whether it waits for hardware, takes it, or has it; see `turns.py`."""
    turn_time: Time | None = None
    """When that changed."""
    retry: str | None = None
    """Value of the retry annotation that was last obeyed."""
    stages: list[StageStatus] = []
    """One entry a stage, in order."""
    release: ReleaseStatus | None = None
    """State of the release."""
    conditions: list[Condition] = []
    """Valid, Progressing, Complete, Released."""

    def to_dict(self) -> dict[str, Any]:
        """camelCase; fields that are None are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def format_time(moment: datetime) -> str:
    """RFC 3339 in whole seconds, as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def with_condition(
    conditions: list[Condition], kind: str, holds: bool, reason: str, message: str, generation: int, now: datetime
) -> list[Condition]:
    """Replaces the condition of one type; the transition time changes only with the status."""
    status: Literal["True", "False"] = "True" if holds else "False"
    old = next((condition for condition in conditions if condition.type == kind), None)
    since = old.last_transition_time if old is not None and old.status == status else format_time(now)
    new = Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message,
        observed_generation=generation,
        last_transition_time=since,
    )
    return sorted([*(c for c in conditions if c.type != kind), new], key=lambda condition: condition.type)
