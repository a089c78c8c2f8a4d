"""What kube-controller-manager, the scheduler and KServe would do, for the objects that tests make."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
from typing import Any

from fake_kube import FakeKube, Json
from kubelet import NODE, TICK


class Workloads:
    """Makes the pods of Deployments, StatefulSets and Jobs, counts them, and lets InferenceServices be ready."""

    def __init__(self, kube: FakeKube) -> None:
        self._kube = kube
        self._loop: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Workloads:
        self._loop = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)

    def check(self) -> None:
        """Raises what ended the loop."""
        if self._loop is not None and self._loop.done():
            self._loop.result()

    async def _work(self) -> None:
        while True:
            for (kind, _, _), body in list(self._kube.objects.items()):
                match kind:
                    case "Deployment":
                        await self._scale(body, [f"{body['metadata']['name']}-{index}" for index in _range(body)])
                    case "StatefulSet":
                        await self._scale(body, [f"{body['metadata']['name']}-{index}" for index in _range(body)])
                    case "Job":
                        await self._job(body)
                    case "InferenceService":
                        self._status(body, _serving(body))
            await asyncio.sleep(TICK)

    def _pods(self, owner: Json) -> list[Json]:
        uid = owner["metadata"]["uid"]
        return [
            body
            for (kind, _, _), body in self._kube.objects.items()
            if kind == "Pod" and any(item["uid"] == uid for item in body["metadata"].get("ownerReferences") or [])
        ]

    async def _scale(self, owner: Json, names: list[str]) -> None:
        spec = owner["spec"]
        version = hashlib.sha256(json.dumps(spec["template"], sort_keys=True).encode()).hexdigest()[:10]
        mine = {pod["metadata"]["name"]: pod for pod in self._pods(owner)}
        for name, pod in mine.items():
            if name not in names or pod["metadata"]["annotations"]["version"] != version:
                await self._kube.delete("Pod", pod["metadata"]["namespace"], name)
        for name in names:
            if name not in mine:
                extra = {"hostname": name, "subdomain": spec["serviceName"]} if "serviceName" in spec else {}
                await self._make(owner, name, spec["template"], extra, {"version": version})
        ready = [
            pod for pod in mine.values() if _is_ready(pod) and pod["metadata"]["annotations"]["version"] == version
        ]
        status = {
            "observedGeneration": owner["metadata"].get("generation", 0),
            "replicas": len(mine),
            "readyReplicas": len(ready),
            "updatedReplicas": len(
                [pod for pod in mine.values() if pod["metadata"]["annotations"]["version"] == version]
            ),
        }
        self._status(owner, status)

    async def _job(self, job: Json) -> None:
        if any(item["status"] == "True" for item in job.get("status", {}).get("conditions") or []):
            return
        spec = job["spec"]
        pods = self._pods(job)
        phases = [pod.get("status", {}).get("phase", "Pending") for pod in pods]
        failed = [pod for pod, phase in zip(pods, phases, strict=True) if phase == "Failed"]
        status: Json = {"active": phases.count("Pending") + phases.count("Running")}
        status |= {"failed": len(failed), "succeeded": phases.count("Succeeded")}
        if status["succeeded"] >= spec["completions"]:
            status["conditions"] = [{"type": "Complete", "status": "True"}]
        elif reason := _job_failure(spec, failed):
            status["conditions"] = [{"type": "Failed", "status": "True", "reason": reason}]
        elif status["active"] == 0:
            name = f"{job['metadata']['name']}-{len(pods)}"
            await self._make(job, name, spec["template"], {}, {})
        self._status(job, status)

    async def _make(self, owner: Json, name: str, template: Json, extra: Json, annotations: dict[str, str]) -> None:
        meta = owner["metadata"]
        pod = copy.deepcopy(template)
        pod.setdefault("metadata", {}).setdefault("annotations", {}).update(annotations)
        pod["metadata"] |= {"name": name, "ownerReferences": [{"uid": meta["uid"], "name": meta["name"]}]}
        pod["metadata"]["creationTimestamp"] = f"2026-01-01T00:00:{len(self._pods(owner)):02}Z"
        pod["spec"] |= {"nodeName": NODE, **extra}
        await self._kube.create("Pod", meta["namespace"], {"apiVersion": "v1", "kind": "Pod", **pod})

    def _status(self, body: Json, status: Json) -> None:
        if body.get("status") != status:
            body["status"] = status
            self._kube._touch(body)


def _range(body: Json) -> range:
    return range(body["spec"].get("replicas", 1))


def _is_ready(pod: Json) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def _job_failure(spec: Json, failed: list[Json]) -> str | None:
    """Why a Job is over, as its pod failure policy and its back-off limit have it."""
    final: list[Any] = [
        rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    for pod in failed:
        for container in [*pod["status"]["containerStatuses"], *(pod["status"].get("initContainerStatuses") or [])]:
            code = container["state"].get("terminated", {}).get("exitCode", 0)
            if code and any(code in values for values in final):
                return "PodFailurePolicy"
    return "BackoffLimitExceeded" if len(failed) > spec["backoffLimit"] else None


def _serving(service: Json) -> Json:
    """KServe's status of an InferenceService that serves what its spec says."""
    uri = service["spec"]["predictor"]["model"]["storageUri"]
    return {
        "observedGeneration": service["metadata"].get("generation", 0),
        "conditions": [{"type": "Ready", "status": "True"}, {"type": "PredictorReady", "status": "True"}],
        "servedModel": uri,
    }
