"""An API server in memory with the rules that matter here: merge patches, resource versions, generations, owners."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from kubernetes.aio.client.exceptions import ApiException

Json = dict[str, Any]

TEMPLATE = {
    "metadata": {"labels": {"app.kubernetes.io/name": "steersman"}},
    "spec": {
        "containers": [
            {
                "name": "main",
                "image": "registry.example/steersman:1",
                "args": ["--config", "/etc/steersman/config.yaml"],
                "volumeMounts": [{"name": "artifacts", "mountPath": "/artifacts"}],
            }
        ],
        "volumes": [{"name": "artifacts", "persistentVolumeClaim": {"claimName": "steersman-artifacts"}}],
    },
}
TRAINER = copy.deepcopy(TEMPLATE)
TRAINER["spec"]["containers"][0].pop("args")  # type: ignore[index]
TEMPLATES = {"trainer": TRAINER, "policy": TEMPLATE, "reward": TEMPLATE, "reference": TEMPLATE}

DATA = {
    "demonstrations": {"train": "demos.jsonl"},
    "preferences": {"train": "prefs.jsonl"},
    "prompts": {"train": "prompts.jsonl", "heldout": "s3://bucket/heldout.jsonl"},
}


def alignment_run(name: str = "demo", *, uid: str = "uid-1", **spec: Any) -> Json:
    """A run with every kind of stage; `spec` replaces fields of the spec."""
    stages = [{"sft": {}}, {"rewardModel": {}}, {"rl": {"steps": 2}}, {"evaluate": {}}]
    return {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": name, "namespace": "ml", "uid": uid, "generation": 1, "resourceVersion": "1"},
        "spec": {"data": DATA, "stages": stages, **spec},
    }


def deployment(name: str = "steersman-policy") -> Json:
    """The chart's Deployment of the policy service."""
    labels = {"app.kubernetes.io/component": "policy", "steersman.dev/pool": "shared"}
    container = {
        "name": "policy",
        "image": "registry.example/steersman-gpu:1",
        "env": [{"name": "HOME", "value": "/t"}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "ml", "uid": "deploy", "resourceVersion": "1", "generation": 1},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
        "status": {"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2},
    }


def inference_service(name: str = "chat", uri: str = "pvc://steersman-artifacts/old") -> Json:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "namespace": "ml", "uid": "isvc", "resourceVersion": "1"},
        "spec": {
            "predictor": {
                "minReplicas": 2,
                "maxReplicas": 4,
                "model": {"modelFormat": {"name": "steersman"}, "storageUri": uri},
            }
        },
    }


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386, with a habit of the API server: it drops the nulls inside list elements too."""
    if isinstance(patch, list):
        return [merge(None, item) for item in patch]
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    out = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merge(out.get(key), value)
    return out


def overlay(target: Any, fields: Any) -> Any:
    """Server-side apply: lists of things with a name are merged by it, other lists are replaced."""
    if isinstance(fields, dict):
        out = dict(target) if isinstance(target, dict) else {}
        return {**out, **{key: overlay(out.get(key), value) for key, value in fields.items()}}
    if isinstance(fields, list) and fields and all(isinstance(item, dict) and "name" in item for item in fields):
        mine = {item["name"]: item for item in fields}
        others = target if isinstance(target, list) else []
        kept = [overlay(item, mine.pop(item["name"])) if item["name"] in mine else item for item in others]
        return [*kept, *mine.values()]
    return copy.deepcopy(fields)


def leaves(fields: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and values of what is applied; lists without names count whole."""
    if isinstance(fields, dict):
        for key, value in fields.items():
            yield from leaves(value, (*path, key))
    elif isinstance(fields, list) and fields and all(isinstance(item, dict) and "name" in item for item in fields):
        for item in fields:
            yield from leaves(item, (*path, f"[{item['name']}]"))
    else:
        yield path, fields


def look_up(target: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if key.startswith("["):
            target = next((item for item in target or [] if item.get("name") == key[1:-1]), None)
        else:
            target = (target or {}).get(key)
    return target


class FakeKube:
    """Has the interface of `services.controller.kube.Kube`."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Json] = {}
        self.logs: dict[str, str] = {}
        self.writes: list[tuple[str, str, str]] = []
        self.listeners: list[Callable[[str, Json], None]] = []
        """Called with ADDED, MODIFIED or DELETED and the object, as a watch would be."""
        self.owners: dict[tuple[str, str, str], dict[tuple[str, ...], set[str]]] = {}
        """Managers of fields that were applied."""
        self._versions = itertools.count(100)

    def put(self, body: Json) -> Json:
        meta = body["metadata"]
        key = (body["kind"], meta["namespace"], meta["name"])
        change = "MODIFIED" if key in self.objects else "ADDED"
        self.objects[key] = body
        self._tell(change, body)
        return body

    def find(self, kind: str, name: str) -> Json | None:
        return self.objects.get((kind, "ml", name))

    def names(self, kind: str) -> list[str]:
        return sorted(name for found, _, name in self.objects if found == kind)

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        found = self.objects.get((kind, namespace, name))
        return copy.deepcopy(found)

    async def list(self, kind: str, namespace: str, selector: str | None = None) -> list[Json]:
        found = [body for (k, n, _), body in self.objects.items() if (k, n) == (kind, namespace)]
        for term in selector.split(",") if selector else ():
            key, given, value = term.partition("=")
            labels = [body["metadata"].get("labels", {}) for body in found]
            kept = zip(found, labels, strict=True)
            found = [body for body, mine in kept if (mine.get(key) == value if given else key in mine)]
        return copy.deepcopy(found)

    async def create(self, kind: str, namespace: str, body: Json) -> bool:
        key = (kind, namespace, body["metadata"]["name"])
        if key in self.objects:
            return False
        self.writes.append(("create", kind, key[2]))
        body = copy.deepcopy(body)
        body["metadata"] |= {"namespace": namespace, "uid": f"uid-{next(self._versions)}"}
        body["metadata"] |= {"resourceVersion": str(next(self._versions)), "generation": 1}
        self.objects[key] = body
        self._tell("ADDED", body)
        return True

    async def patch(self, kind: str, namespace: str, name: str, body: Json, subresource: str | None = None) -> Json:
        key = (kind, namespace, name)
        if key not in self.objects:
            raise ApiException(status=404, reason="Not Found")
        current = self.objects[key]
        expected = body.get("metadata", {}).get("resourceVersion")
        if expected is not None and expected != current["metadata"]["resourceVersion"]:
            raise ApiException(status=409, reason="Conflict")
        wanted = merge(current, body)
        if subresource is None:
            wanted["status"] = current.get("status", {})
        else:
            wanted = {**current, "status": wanted.get("status", {})}
        if {k: v for k, v in wanted.items() if v != {}} == {k: v for k, v in current.items() if v != {}}:
            return copy.deepcopy(current)
        self.writes.append(("patch", kind, name))
        wanted["metadata"] = {**wanted["metadata"], "resourceVersion": str(next(self._versions))}
        if wanted.get("spec") != current.get("spec"):
            wanted["metadata"]["generation"] = current["metadata"].get("generation", 0) + 1
        self.objects[key] = wanted
        self._tell("MODIFIED", wanted)
        if wanted["metadata"].get("deletionTimestamp") and not wanted["metadata"].get("finalizers"):
            self._remove(key)
        return copy.deepcopy(wanted)

    async def apply(
        self,
        kind: str,
        namespace: str,
        name: str,
        body: Json,
        manager: str = "steersman-controller",
        force: bool = True,
    ) -> Json:
        """Server-side apply with field owners: conflicts with others' values, and the removal of what is left out."""
        key = (kind, namespace, name)
        current = self.objects.get(key)
        if current is None:
            raise ApiException(status=404, reason="Not Found")
        expected = body.get("metadata", {}).get("resourceVersion")
        if expected is not None and expected != current["metadata"]["resourceVersion"]:
            raise ApiException(status=409, reason="Conflict")
        owners = self.owners.setdefault(key, {})
        spec = {"spec": body.get("spec") or {}}
        fields = dict(leaves(spec))
        for path, value in fields.items():
            others = owners.get(path, set()) - {manager}
            if others and look_up(current, path) != value:
                if not force:
                    raise ApiException(status=409, reason=f"conflict with {sorted(others)} on {'.'.join(path)}")
                owners[path] = set()
        dropped = [path for path, who in owners.items() if who == {manager} and path not in fields]
        wanted = copy.deepcopy(current)
        for path in dropped:
            parent = look_up(wanted, path[:-1])
            if isinstance(parent, dict):
                parent.pop(path[-1], None)
            owners.pop(path)
        wanted = overlay(wanted, spec)
        annotations = body.get("metadata", {}).get("annotations")
        wanted["metadata"]["annotations"] = annotations or {}
        for path in list(fields):
            owners.setdefault(path, set()).add(manager)
        if wanted == {**current, "metadata": {**current["metadata"], "annotations": annotations or {}}}:
            return copy.deepcopy(current)
        self.writes.append(("apply", kind, name))
        wanted["metadata"]["resourceVersion"] = str(next(self._versions))
        if wanted["spec"] != current["spec"]:
            wanted["metadata"]["generation"] = current["metadata"].get("generation", 0) + 1
        return copy.deepcopy(self.put(wanted))

    async def replace(self, kind: str, namespace: str, name: str, body: Json) -> Json:
        current = self.objects.get((kind, namespace, name))
        if current is None:
            raise ApiException(status=404, reason="Not Found")
        if body["metadata"].get("resourceVersion") != current["metadata"]["resourceVersion"]:
            raise ApiException(status=409, reason="Conflict")
        self.writes.append(("replace", kind, name))
        meta = {**current["metadata"], "resourceVersion": str(next(self._versions))}
        return copy.deepcopy(self.put({**body, "kind": kind, "metadata": meta}))

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        key = (kind, namespace, name)
        body = self.objects.get(key)
        if body is None:
            return
        self.writes.append(("delete", kind, name))
        if body["metadata"].get("finalizers"):
            body["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            self._touch(body)
        else:
            self._remove(key)

    async def pod_log(self, namespace: str, name: str, lines: int) -> str:
        return "\n".join(self.logs.get(name, "").splitlines()[-lines:])

    def _remove(self, key: tuple[str, str, str]) -> None:
        """Removes an object and, as the garbage collector does, what it owns."""
        gone = self.objects.pop(key)
        self._tell("DELETED", gone)
        uid = gone["metadata"].get("uid")
        for other, body in list(self.objects.items()):
            if any(owner.get("uid") == uid for owner in body["metadata"].get("ownerReferences") or []):
                self._remove(other)

    def _touch(self, body: Json) -> None:
        """A change that somebody else made."""
        body["metadata"]["resourceVersion"] = str(next(self._versions))
        self._tell("MODIFIED", body)

    def _tell(self, change: str, body: Json) -> None:
        for listener in self.listeners:
            listener(change, body)

    # What the cluster's own controllers and kubelets would do

    def finish_job(self, name: str) -> None:
        self.set_status("Job", name, {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]})

    def fail_pod(self, job: str, code: int, log: str, *, final: bool, number: int = 1) -> None:
        labels = self.objects["Job", "ml", job]["metadata"]["labels"]
        owner = {"uid": self.objects["Job", "ml", job]["metadata"]["uid"]}
        ended = {"exitCode": code, "message": log}
        self.put(
            {
                "kind": "Pod",
                "metadata": {
                    "name": f"{job}-x{number}",
                    "namespace": "ml",
                    "labels": labels,
                    "ownerReferences": [owner],
                    "creationTimestamp": f"2026-01-01T00:00:{number:02}Z",
                },
                "status": {"phase": "Failed", "containerStatuses": [{"state": {"terminated": ended}}]},
            }
        )
        status: Json = {"failed": number}
        if final:
            status["conditions"] = [{"type": "Failed", "status": "True", "reason": "PodFailurePolicy"}]
        self.set_status("Job", job, status)

    def run_pod(self, job: str, log: str) -> None:
        meta = self.objects["Job", "ml", job]["metadata"]
        self.put(
            {
                "kind": "Pod",
                "metadata": {
                    "name": f"{job}-live",
                    "namespace": "ml",
                    "labels": meta["labels"],
                    "ownerReferences": [{"uid": meta["uid"]}],
                },
                "status": {"phase": "Running"},
            }
        )
        self.logs[f"{job}-live"] = log

    def services_up(self) -> None:
        """Every StatefulSet reaches its wanted replicas."""
        for (kind, _, _), body in self.objects.items():
            if kind == "StatefulSet":
                replicas = body["spec"]["replicas"]
                body["status"] = {
                    "observedGeneration": body["metadata"]["generation"],
                    "updatedReplicas": replicas,
                    "readyReplicas": replicas,
                }
                self._touch(body)

    def roll_out(self) -> None:
        """Every Deployment reaches its wanted replicas with its newest pods."""
        for (kind, _, _), body in self.objects.items():
            if kind == "Deployment":
                replicas, generation = body["spec"]["replicas"], body["metadata"].get("generation", 1)
                counts = dict.fromkeys(("replicas", "updatedReplicas", "availableReplicas"), replicas)
                body["status"] = {"observedGeneration": generation, **counts}
                self._touch(body)

    def set_status(self, kind: str, name: str, status: Json) -> None:
        body = self.objects[kind, "ml", name]
        body["status"] = status
        self._touch(body)

    def edit(self, name: str, **fields: Any) -> None:
        """What a person does with `kubectl edit alignmentrun`: annotations, or fields of the spec."""
        run = self.objects["AlignmentRun", "ml", name]
        annotations = fields.pop("annotations", None)
        if annotations is not None:
            run["metadata"]["annotations"] = annotations
        if fields:
            run["spec"] = {**run["spec"], **fields}
            run["metadata"]["generation"] += 1
        self._touch(run)
