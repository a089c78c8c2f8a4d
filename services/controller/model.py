"""What the planner sees and what it asks for: plain values, no API client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from services.controller.config import Storage
from services.controller.status import VariantSignals
from steersman.config.tls import ClientTls

Json = dict[str, Any]
Manifest = Mapping[str, Any]

RUN_LABEL = "steersman.dev/run"
STAGE_LABEL = "steersman.dev/stage"
POOL_LABEL = "steersman.dev/pool"
"""Keeps a run's service pods out of the chart's Services."""
SPEC_HASH = "steersman.dev/spec-hash"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
APPROVE = "steersman.dev/approve"
CANCEL = "steersman.dev/cancel"
RETRY = "steersman.dev/retry"

Kind = Literal["ConfigMap", "Service", "StatefulSet", "Job", "InferenceService", "AlignmentRun"]


@dataclass(frozen=True)
class Settings:
    """What the planner knows about its cluster."""

    templates: Mapping[str, Json]
    """Pod templates `trainer`, `policy`, `reward`, `reference`."""
    storage: Storage = field(default_factory=Storage)
    can_watch: bool = False
    """Live signals can be read, so a canary is possible."""
    gpu_resource: str = "nvidia.com/gpu"
    tls: ClientTls | None = None
    """Certificates as the pods of runs see them; None: services speak plain text."""


@dataclass(frozen=True)
class Progress:
    """The last progress line of a stage."""

    step: int | None = None
    total: int | None = None
    reward: float | None = None
    kl: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class JobState:
    """A stage's Job and the last failure among its pods."""

    owner: str
    """uid of the run that owns it."""
    terminating: bool = False
    complete: bool = False
    failed: bool = False
    failed_pods: int = 0
    exit_code: int | None = None
    job_reason: str | None = None
    """Why the Job gave up: BackoffLimitExceeded, PodFailurePolicy, DeadlineExceeded."""
    log: str | None = None
    waiting: str | None = None
    """Why no pod runs, for example `Unschedulable: 0/3 nodes are available`."""
    progress: Progress = Progress()


@dataclass(frozen=True)
class SetState:
    """A StatefulSet that serves a run."""

    spec_hash: str
    replicas: int
    ready: bool
    """All replicas are ready, at the current generation."""


@dataclass(frozen=True)
class Signals:
    """Live signals of both variants since the canary step began."""

    champion: VariantSignals
    candidate: VariantSignals


@dataclass(frozen=True)
class Observed:
    """The cluster, as far as one run is concerned."""

    jobs: Mapping[str, JobState] = field(default_factory=dict)
    """By stage name."""
    services: Mapping[str, SetState] = field(default_factory=dict)
    """By service: policy, reward, reference."""
    has_manifest: bool = False
    """The run's ConfigMap is there."""
    inference_service: Manifest | None = None
    signals: Signals | None = None
    """None: not available now."""


@dataclass(frozen=True)
class Create:
    """Creates an object; that it exists already is not an error."""

    kind: Kind
    body: Json


@dataclass(frozen=True)
class DrawToken:
    """Creates a Secret with a fresh random `token`; one that exists stays. Drawn when it is created: plans are pure."""

    body: Json


@dataclass(frozen=True)
class Patch:
    """Merge patch; a resourceVersion in it makes the API server refuse a stale one."""

    kind: Kind
    name: str
    body: Json


@dataclass(frozen=True)
class Delete:
    """Deletes an object and waits for its pods; that it is gone already is not an error."""

    kind: Kind
    name: str


@dataclass(frozen=True)
class SetAlias:
    """Points an alias of the model registry at the version of this run."""

    alias: Literal["candidate", "champion"]


Action = Create | DrawToken | Patch | Delete | SetAlias


@dataclass(frozen=True)
class Event:
    """A Kubernetes event about the run; written once for the same run, reason and key."""

    reason: str
    message: str
    warning: bool = False
    key: str = ""


@dataclass(frozen=True)
class Plan:
    status: Json
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_seconds: float | None = None
