"""What the planner sees: plain values, no API client. What it asks for is in `actions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.controller.actions import Action, Json
from services.controller.config import RunCertificates, Storage
from services.controller.endpoint import Endpoint
from services.controller.trouble import Trouble
from services.controller.turns import Peer
from steersman.canary import Arm
from steersman.config.tls import ClientTls

Manifest = Mapping[str, Any]

RUN_LABEL = "steersman.dev/run"
STAGE_LABEL = "steersman.dev/stage"
POOL_LABEL = "steersman.dev/pool"
"""Keeps a run's service pods out of the chart's Services."""
ONLY_FOR_LABEL = "steersman.dev/only-for"
"""On pods that only those of the same run may call: its trainers and services, not the candidate that it releases."""
SPEC_HASH = "steersman.dev/spec-hash"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
APPROVE = "steersman.dev/approve"
CANCEL = "steersman.dev/cancel"
RETRY = "steersman.dev/retry"
CANARY_OF = "steersman.dev/canary-of"
"""On an InferenceService: name of the run whose canary it carries, also after that run is gone."""


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
    certificates: RunCertificates | None = None
    """Each run gets a certificate of its own; None: its pods mount the one that the templates name."""
    network: bool = False
    """Each run gets a NetworkPolicy around its pods."""
    stuck_seconds: float = 1800.0
    """A stage that is held up for so long by what does not mend itself has failed."""


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
    pod_reason: str | None = None
    """Why its pod was ended from outside, for example OOMKilled, Evicted or PreemptionByScheduler."""
    job_reason: str | None = None
    """Why the Job gave up: BackoffLimitExceeded, PodFailurePolicy, DeadlineExceeded."""
    log: str | None = None
    waiting: str | None = None
    """The queue that holds it."""
    wanted: int = 1
    """Pods that it needs at the same time."""
    running: int = 0
    """Pods that run."""
    trouble: Trouble | None = None
    """Why a pod does not run."""
    progress: Progress = Progress()


@dataclass(frozen=True)
class SetState:
    """A StatefulSet that serves a run."""

    spec_hash: str
    replicas: int
    ready: bool
    """All replicas are ready, at the current generation."""
    stage: str = ""
    """The stage that gave its pods their shape."""
    trouble: Trouble | None = None
    """Why a pod does not run."""


@dataclass(frozen=True)
class Signals:
    """What both variants did since the candidate was ready."""

    champion: Arm
    candidate: Arm


@dataclass(frozen=True)
class WorkloadState:
    """A Workload of Kueue that stands for all pods of a stage."""

    stage: str
    admitted: bool = False
    evicted: bool = False
    """Its quota is asked back, or was never kept."""
    message: str = ""
    """What the queue says."""


@dataclass(frozen=True)
class Observed:
    """The cluster, as far as one run is concerned."""

    jobs: Mapping[str, JobState] = field(default_factory=dict)
    """By stage name."""
    services: Mapping[str, SetState] = field(default_factory=dict)
    """By service: policy, reward, reference."""
    present: frozenset[str] = frozenset()
    """Kinds of what the run has from its start to its end that are there: its ConfigMap, for example."""
    endpoint: Endpoint | None = None
    """What serves the bot, where the run releases to it."""
    peers: tuple[Peer, ...] = ()
    """The other runs that are not over."""
    workload: WorkloadState | None = None
    """Kueue's view of the stage, where it has a queue and services."""
    signals: Signals | None = None
    """None: not available now."""


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
