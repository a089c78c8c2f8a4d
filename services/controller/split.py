"""Releases without KServe: two Deployments of the gateway's engine, and a gateway that splits by conversation.

    ConfigMap <deployment>-split ── mounted ──> gateway ── 90% ──> Deployment <deployment>           (the chart's)
                                                   └────── 10% ──> Deployment and Service <candidate>

The candidate is a copy of the champion's Deployment with another model. It, its Service and the ConfigMap belong to
the run, so that they go with it, whoever deletes it: a gateway whose ConfigMap is gone sends everything to the
champion. Promotion gives the candidate all traffic, rolls the champion's Deployment over to the new model (an
environment variable that the controller owns by server-side apply; nobody else sets it), and then ends the candidate.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import yaml

from services.controller.actions import Action, Apply, Create, Delete, Json, Patch
from services.controller.endpoint import Variant
from services.controller.model import POOL_LABEL, RUN_LABEL, Manifest
from services.controller.objects import owned
from services.controller.status import ReleaseStatus

MODEL_VARIABLE = "STEERSMAN_SET"
"""Environment variable whose lines override the configuration of a service; see `steersman.rpc.app`."""
SPLIT_FILE = "split.yaml"
POLICY_PORT = 50051


def split_name(deployment: str) -> str:
    """Name of the ConfigMap that the gateway mounts."""
    return f"{deployment}-split"


@dataclass(frozen=True)
class SplitEndpoint:
    """See `services.controller.endpoint.Endpoint`."""

    run: Manifest
    deployment: Manifest
    """The champion."""
    split: Manifest | None = None
    """ConfigMap with the shares, if there is one."""
    candidate: Manifest | None = None
    """This run's Deployment, if there is one."""

    @property
    def title(self) -> str:
        return f"Deployment {self._name}"

    @property
    def _name(self) -> str:
        return str(self.deployment["metadata"]["name"])

    @property
    def model(self) -> str | None:
        return _model_of(self.deployment)

    @property
    def _shares(self) -> Json:
        text = ((self.split or {}).get("data") or {}).get(SPLIT_FILE) or ""
        return (yaml.safe_load(text) or {}).get("candidate") or {}

    @property
    def canaries(self) -> tuple[str, ...]:
        return (str(self._shares["name"]),) if self._shares else ()

    def share(self, candidate: str) -> int | None:
        shares = self._shares
        return shares.get("percent") if self.candidate is not None and shares.get("name") == candidate else None

    def is_ready(self, candidate: str, percent: int) -> bool:
        return self.share(candidate) == percent and self.candidate is not None and _is_rolled_out(self.candidate)

    def serves(self, status: ReleaseStatus) -> bool:
        gone = self.candidate is None and status.candidate not in self.canaries
        return self.model == status.model and _is_rolled_out(self.deployment) and gone

    def give(self, status: ReleaseStatus, percent: int) -> tuple[Action, ...]:
        actions: list[Action] = []
        if self.candidate is None:
            actions += [Create("Service", self._service(status)), Create("Deployment", self._copy(status))]
        return (*actions, self._share(status, percent))

    def promote(self, status: ReleaseStatus) -> tuple[Action, ...]:
        if self.model != status.model:
            everything = () if self.share(status.candidate) == 100 else (self._share(status, 100),)
            return (*everything, self._set_model(status.model))
        return self.take_back(status.candidate) if _is_rolled_out(self.deployment) else ()

    def publish(self, model: str) -> tuple[Action, ...]:
        return () if self.model == model else (self._set_model(model),)

    def take_back(self, candidate: str) -> tuple[Action, ...]:
        actions: list[Action] = []
        if candidate in self.canaries:
            actions.append(Delete("ConfigMap", split_name(self._name)))
        if self.candidate is not None:
            actions += [Delete("Deployment", candidate), Delete("Service", candidate)]
        return tuple(actions)

    def variants(self, candidate: str) -> tuple[Variant, Variant]:
        champion, challenger = (
            Variant(name, f'variant="{name}"', "steersman_gateway_variant_answer") for name in (self._name, candidate)
        )
        return champion, challenger

    def _service(self, status: ReleaseStatus) -> Json:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": owned(self.run, status.candidate),
            "spec": {
                "clusterIP": "None",
                "selector": self._labels(status),
                "ports": [{"name": "grpc", "port": POLICY_PORT, "targetPort": "grpc"}],
            },
        }

    def _copy(self, status: ReleaseStatus) -> Json:
        """As the champion runs, under labels that keep it out of the champion's Service, with its own model."""
        stable = self.deployment["spec"]
        template = copy.deepcopy(stable["template"])
        template["metadata"]["labels"] = {**template["metadata"].get("labels", {}), **self._labels(status)}
        container = template["spec"]["containers"][0]
        kept = [item for item in container.get("env") or [] if item["name"] != MODEL_VARIABLE]
        container["env"] = [*kept, _model_variable(status.model)]
        spec = {
            "replicas": stable.get("replicas", 1),
            "selector": {"matchLabels": self._labels(status)},
            "template": template,
        }
        metadata = owned(self.run, status.candidate)
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}

    def _labels(self, status: ReleaseStatus) -> dict[str, str]:
        return {POOL_LABEL: status.candidate, RUN_LABEL: self.run["metadata"]["name"]}

    def _share(self, status: ReleaseStatus, percent: int) -> Action:
        namespace = self.run["metadata"]["namespace"]
        shares = {
            "champion": {"name": self._name},
            "candidate": {
                "name": status.candidate,
                "percent": percent,
                "endpoints": [f"dns:///{status.candidate}.{namespace}.svc:{POLICY_PORT}"],
            },
        }
        data = {SPLIT_FILE: yaml.safe_dump(shares, sort_keys=False)}
        name = split_name(self._name)
        if self.split is not None:
            version = self.split["metadata"]["resourceVersion"]
            return Patch("ConfigMap", name, {"metadata": {"resourceVersion": version}, "data": data})
        return Create(
            "ConfigMap", {"apiVersion": "v1", "kind": "ConfigMap", "metadata": owned(self.run, name), "data": data}
        )

    def _set_model(self, model: str) -> Apply:
        container = self.deployment["spec"]["template"]["spec"]["containers"][0]["name"]
        pod = {"containers": [{"name": container, "env": [_model_variable(model)]}]}
        meta = self.deployment["metadata"]
        body = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": meta["name"], "resourceVersion": meta["resourceVersion"]},
            "spec": {"template": {"spec": pod}},
        }
        return Apply("Deployment", meta["name"], body)


def _model_variable(model: str) -> Json:
    return {"name": MODEL_VARIABLE, "value": f"model={model}"}


def _model_of(deployment: Manifest) -> str | None:
    for item in deployment["spec"]["template"]["spec"]["containers"][0].get("env") or []:
        if item["name"] == MODEL_VARIABLE and str(item.get("value", "")).startswith("model="):
            return str(item["value"]).removeprefix("model=")
    return None


def _is_rolled_out(deployment: Manifest) -> bool:
    """All replicas are new and answer, at the current generation."""
    status = deployment.get("status") or {}
    replicas = deployment["spec"].get("replicas", 1)
    current = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
    counts = (status.get("updatedReplicas", 0), status.get("availableReplicas", 0))
    return bool(current) and min(counts) >= replicas and status.get("replicas", 0) == replicas
