"""What the planner asks for: plain values, no API client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]

Kind = Literal[
    "ConfigMap", "Service", "StatefulSet", "Deployment", "Job", "Workload", "InferenceService", "AlignmentRun"
]


@dataclass(frozen=True)
class Create:
    """Creates an object; that it exists already is not an error if it is this run's."""

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
class Apply:
    """Server-side apply as the owner of the fields in `body`, which it takes from whoever has them; a resourceVersion
    in it makes the API server refuse a stale one."""

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


Action = Create | DrawToken | Patch | Apply | Delete | SetAlias
