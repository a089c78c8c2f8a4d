"""Releases through KServe: the candidate is an entry of an InferenceService's `spec.canary`.

KServe (Standard mode, 0.20 and newer) runs each entry as a Deployment of its own and splits the traffic, request by
request. Promotion renames the stable predictor to the canary's name and removes the entry, which moves the running
pods over without a restart (pkg/apis/serving/v1beta1/inference_service.go).

The controller owns three fields of the object, by server-side apply: the stable predictor's name and model, and
`spec.canary`. Each apply names all three, because a field that a manager no longer names is removed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from services.controller.actions import Action, Apply, Json
from services.controller.endpoint import Variant
from services.controller.model import CANARY_OF, Manifest
from services.controller.status import ReleaseStatus

_NOT_IN_CANARY = ("name", "maxReplicas", "scaleTarget", "scaleMetric", "scaleMetricType", "autoScaling", "workerSpec")
"""KServe refuses these in a canary: it uses fixed replicas on one node."""


@dataclass(frozen=True)
class KServeEndpoint:
    """See `services.controller.endpoint.Endpoint`."""

    service: Manifest
    run: str
    """Name of the run that releases."""

    @property
    def title(self) -> str:
        return f"InferenceService {self.service['metadata']['name']}"

    @property
    def model(self) -> str | None:
        uri: str | None = self._stable.get("model", {}).get("storageUri")
        return uri

    @property
    def canaries(self) -> tuple[str, ...]:
        return tuple(entry["predictor"].get("name", "") for entry in self._entries)

    @property
    def _stable(self) -> Json:
        predictor: Json = self.service["spec"]["predictor"]
        return predictor

    @property
    def _entries(self) -> list[Json]:
        return self.service["spec"].get("canary") or []

    def share(self, candidate: str) -> int | None:
        found = [entry["trafficPercent"] for entry in self._entries if entry["predictor"].get("name") == candidate]
        return found[0] if found else None

    def is_ready(self, candidate: str, percent: int) -> bool:
        statuses = (self.service.get("status") or {}).get("canaryStatuses") or []
        return any(
            entry.get("name") == candidate and entry.get("ready") and entry.get("trafficPercent") == percent
            for entry in statuses
        )

    def serves(self, status: ReleaseStatus) -> bool:
        return self.model == status.model and status.candidate not in self.canaries

    def give(self, status: ReleaseStatus, percent: int) -> tuple[Action, ...]:
        """The candidate runs as the stable predictor does, with its own name and model and a fixed replica count."""
        predictor = {key: copy.deepcopy(value) for key, value in self._stable.items() if key not in _NOT_IN_CANARY}
        predictor["name"] = status.candidate
        predictor["model"]["storageUri"] = status.model
        return (self._apply(canary=[{"trafficPercent": percent, "predictor": predictor}]),)

    def promote(self, status: ReleaseStatus) -> tuple[Action, ...]:
        return (self._apply(name=status.candidate, model=status.model),)

    def publish(self, model: str) -> tuple[Action, ...]:
        return (self._apply(model=model, canary=self._entries),)

    def take_back(self, candidate: str) -> tuple[Action, ...]:
        rest = [entry for entry in self._entries if entry["predictor"].get("name") != candidate]
        return () if len(rest) == len(self._entries) else (self._apply(canary=rest),)

    def variants(self, candidate: str) -> tuple[Variant, Variant]:
        return self._variant(self._stable.get("name")), self._variant(candidate)

    def _variant(self, predictor: str | None) -> Variant:
        """KServe's name of the Deployment (constants.PredictorServiceName), which the gateway's pods store."""
        name = self.service["metadata"]["name"]
        workload = f"{name}-{predictor}-predictor" if predictor else f"{name}-predictor"
        return Variant(f"isvc.{workload}", f'pod=~"{workload}-[a-z0-9]+-[a-z0-9]+"')

    def _apply(self, *, name: str | None = None, model: str | None = None, canary: list[Json] | None = None) -> Apply:
        predictor: Json = {"model": {"storageUri": model or self.model}}
        name = name or self._stable.get("name")
        if name is not None:
            predictor["name"] = name
        meta = self.service["metadata"]
        body = {
            "apiVersion": self.service["apiVersion"],
            "kind": "InferenceService",
            "metadata": {
                "name": meta["name"],
                "resourceVersion": meta["resourceVersion"],
                # Says whose canary it is to a controller that finds the run gone.
                **({"annotations": {CANARY_OF: self.run}} if canary else {}),
            },
            "spec": {"predictor": predictor, **({"canary": canary} if canary else {})},
        }
        return Apply("InferenceService", meta["name"], body)
