"""Configuration of the controller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from steersman.config.base import FrozenModel
from steersman.config.tls import ClientTls
from steersman.errors import ConfigError

Seconds = Annotated[float, Field(gt=0)]


class LeaderElection(FrozenModel):
    """Only the holder of a Lease acts; the others wait for it."""

    lease: str = "steersman-controller"
    """Name of the Lease."""
    namespace: str
    """Namespace of the Lease."""
    duration_seconds: Annotated[int, Field(ge=5)] = 15
    """A Lease that is not renewed for this long is free."""


class Storage(FrozenModel):
    """Where runs read and write inside the cluster."""

    claim: str = "steersman-artifacts"
    """PersistentVolumeClaim (ReadWriteMany) that holds the runs."""
    root: str = "/artifacts"
    """Mount path of the claim; run folders lie under `<root>/runs/<namespace>/<name>`."""
    data: str = "/artifacts/data"
    """Relative data files of a manifest are looked up here."""


class RunCertificates(FrozenModel):
    """What cert-manager signs for each run: a certificate with the names of its own services and no others."""

    issuer_ref: dict[str, str]
    """Issuer that signs: name, kind (Issuer or ClusterIssuer), group."""
    duration: str = "2160h"
    """Lifetime."""
    renew_before: str = "720h"
    """How long before its end it is renewed; processes take the new one without a restart."""


class ControllerConfig(FrozenModel):
    namespaces: Annotated[list[str], Field(min_length=1)]
    """Namespaces whose runs are executed."""
    templates: Path = Path("/etc/steersman/templates")
    """Folder with the pod templates `trainer.yaml`, `policy.yaml`, `reward.yaml`, `reference.yaml`."""
    storage: Storage = Storage()
    run_tls: ClientTls | None = None
    """Certificates at the paths where the pods of runs mount them; None: services speak plain text."""
    run_certificates: RunCertificates | None = None
    """Each run gets a certificate of its own, mounted at these paths; None: the one that the templates name."""
    run_network: bool = False
    """Each run gets a NetworkPolicy: only its own pods may call its trainers and services."""
    prometheus_url: str | None = None
    """Prometheus that scrapes the gateways: errors and latency; a canary needs it."""
    database_env: str = "STEERSMAN_DATABASE"
    """Environment variable with the URL of the gateways' database: feedback; a canary needs it."""
    mlflow_url: str | None = None
    """MLflow registry that gets the aliases `candidate` and `champion`; None: none."""
    registered_model: str = "steersman-chat"
    """Name in the registry."""
    leader_election: LeaderElection | None = None
    """None: this is the only replica."""
    resync_seconds: Seconds = 15.0
    """How often every running run is looked at without an event."""
    stuck_seconds: Seconds = 1800.0
    """A stage that is held up for so long by what does not mend itself has failed: an image that cannot be pulled, a
    container that crashes again and again."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of a GPU as a resource of this cluster's nodes."""
    host: str = "0.0.0.0"
    """Address that metrics and health listen on; `::` for IPv6 (and IPv4 where the machine has both)."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Prometheus metrics; None: none."""
    health_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """HTTP: `/healthz` (lives), `/readyz` (watches and may act), `/dry-look` (tries a run); None: none."""


TEMPLATES = ("trainer", "policy", "reward", "reference")


def load_templates(folder: Path) -> dict[str, dict[str, Any]]:
    """The pod templates by name; ConfigError when one is missing or is not a pod template."""
    templates: dict[str, dict[str, Any]] = {}
    for name in TEMPLATES:
        path = folder / f"{name}.yaml"
        try:
            template = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"templates: {path} cannot be read ({error.strerror}); mount the chart's templates"
            ) from None
        if not isinstance(template, dict) or not template.get("spec", {}).get("containers"):
            raise ConfigError(f"templates: {path} is not a pod template with containers")
        templates[name] = template
    return templates
