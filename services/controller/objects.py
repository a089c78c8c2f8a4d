"""The Kubernetes objects of a run: manifest, services, Jobs. Pure functions from the run and the templates."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from services.controller.config import Storage
from services.controller.model import POOL_LABEL, RUN_LABEL, SPEC_HASH, STAGE_LABEL, Json, Manifest, Settings
from steersman.config.manifest import AlignmentRun, Resources, RewardMix, ServiceSpec
from steersman.config.stages import policy_folder, reward_model_folders
from steersman.errors import (
    CancelledError,
    ConflictError,
    DeadlineError,
    InternalError,
    RateLimitedError,
    SteersmanError,
    UnavailableError,
    all_error_types,
)

PORTS = {"policy": 50051, "reward": 50052, "reference": 50053}
WEIGHTS_PORT = 50054
RENDEZVOUS_PORT = 29500
MANIFEST_MOUNT = "/etc/steersman/run"

SERVICES_OF_STAGE: dict[str, tuple[str, ...]] = {
    "rl": ("policy", "reward", "reference"),
    "rejection_sampling": ("policy", "reward"),
    "evaluate": ("policy", "reward"),
}
"""Which services a stage talks to."""

_RETRYABLE = {SteersmanError, UnavailableError, DeadlineError, InternalError, RateLimitedError, ConflictError}
"""Errors that a repetition may mend."""


def final_exit_codes() -> list[int]:
    """Exit codes that repeating the stage cannot mend: wrong input, wrong state, no permission, full disk."""
    retryable = {error.exit_code for error in _RETRYABLE} | {CancelledError.exit_code}
    return sorted({error.exit_code for error in all_error_types()} - retryable)


def reason_of_exit(code: int | None) -> str:
    """One word for an exit code, for example `InvalidArgument`; signals by number (137: OutOfMemoryOrKilled)."""
    if code is None:
        return "StageFailed"
    if code == 137:
        return "OutOfMemoryOrKilled"
    if code > 128:
        return f"Signal{code - 128}"
    if code != SteersmanError.exit_code:
        for error in all_error_types():  # parents come before children
            if error.exit_code == code:
                return error.__name__.removesuffix("Error")
    return "StageFailed"


def object_name(run: str, suffix: str) -> str:
    """`<run>-<suffix>`, cut with a digest where a 57-character label would not hold it."""
    name = f"{run}-{suffix}"
    if len(name) <= 57:  # leaves room for the index of a pod
        return name
    return f"{name[:48].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def spec_hash(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def run_dir(namespace: str, name: str, storage: Storage) -> Path:
    """Folder of a run on the artifacts volume."""
    return Path(storage.root) / "runs" / namespace / name


def owned(run: Manifest, name: str, labels: dict[str, str] | None = None) -> Json:
    """Metadata of an object that goes away with the run."""
    meta = run["metadata"]
    return {
        "name": name,
        "namespace": meta["namespace"],
        "labels": {"app.kubernetes.io/managed-by": "steersman", RUN_LABEL: meta["name"], **(labels or {})},
        "ownerReferences": [
            {
                "apiVersion": run["apiVersion"],
                "kind": run["kind"],
                "name": meta["name"],
                "uid": meta["uid"],
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def endpoints(run: Manifest, manifest: AlignmentRun, service: str) -> list[str]:
    """Addresses that the trainer gets: the manifest's, or those of the run's own pods.

    Every policy replica has an address of its own, because weights go to each; the others are balanced by DNS.
    """
    spec: ServiceSpec = getattr(manifest.spec.services, service)
    if spec.endpoints:
        return list(spec.endpoints)
    name = object_name(manifest.metadata.name, service)
    host = f"{name}.{run['metadata']['namespace']}.svc:{PORTS[service]}"
    if service != "policy":
        return [f"dns:///{host}"]
    return [f"{name}-{index}.{host}" for index in range(spec.replicas)]


def cluster_manifest(run: Manifest, manifest: AlignmentRun, settings: Settings) -> Json:
    """The manifest as the stages read it: addresses filled in, relative data files made absolute."""
    body = copy.deepcopy({key: run[key] for key in ("apiVersion", "kind", "spec")})
    body["metadata"] = {"name": manifest.metadata.name, "namespace": run["metadata"]["namespace"]}
    services = body["spec"].setdefault("services", {})
    for service in PORTS:
        services.setdefault(service, {})["endpoints"] = endpoints(run, manifest, service)
    if not manifest.spec.services.policy.endpoints:
        replicas = services["policy"]["endpoints"]
        services["policy"]["weightsEndpoints"] = [f"{item.rpartition(':')[0]}:{WEIGHTS_PORT}" for item in replicas]
    for kind, splits in (body["spec"].get("data") or {}).items():
        if kind == "demo" or not splits:
            continue
        for split, path in splits.items():
            if path and "://" not in path and not path.startswith("/"):
                splits[split] = f"{settings.storage.data.rstrip('/')}/{path}"
    return body


def manifest_map(run: Manifest, manifest: AlignmentRun, settings: Settings) -> Json:
    """ConfigMap with the manifest of the run."""
    text = yaml.safe_dump(cluster_manifest(run, manifest, settings), sort_keys=False)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": owned(run, object_name(manifest.metadata.name, "manifest")),
        "immutable": True,
        "data": {"run.yaml": text},
    }


def needs(manifest: AlignmentRun, index: int) -> tuple[str, ...]:
    """The services that the run itself must start for a stage."""
    wanted = SERVICES_OF_STAGE.get(manifest.spec.stages[index].kind, ())
    return tuple(name for name in wanted if not getattr(manifest.spec.services, name).endpoints)


def headless_service(run: Manifest, name: str, selector: dict[str, str], ports: dict[str, int]) -> Json:
    """DNS names for each pod, those not ready included: health is asked of the pod itself."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": owned(run, name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector,
            "ports": [{"name": key, "port": port, "targetPort": port} for key, port in ports.items()],
        },
    }


def service_objects(run: Manifest, manifest: AlignmentRun, index: int, service: str, settings: Settings) -> list[Json]:
    """Headless Service and StatefulSet of one service for one stage; the StatefulSet carries a hash of its spec."""
    meta = manifest.metadata
    name = object_name(meta.name, service)
    spec: ServiceSpec = getattr(manifest.spec.services, service)
    selector = {POOL_LABEL: meta.name, "app.kubernetes.io/component": service}
    template = _pod(settings.templates[service], {**selector, RUN_LABEL: meta.name}, spec.resources)
    container = template["spec"]["containers"][0]
    folder = run_dir(run["metadata"]["namespace"], meta.name, settings.storage)
    overrides = _settings_of(manifest, service, folder, index)
    container["args"] = [
        *(container.get("args") or []),
        *(part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")),
    ]
    ports = {"grpc": PORTS[service], **({"weights": WEIGHTS_PORT} if service == "policy" else {})}
    body: Json = {
        "replicas": spec.replicas,
        "serviceName": name,
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": selector},
        "template": template,
    }
    metadata = owned(run, name, {"app.kubernetes.io/component": service})
    metadata["annotations"] = {SPEC_HASH: spec_hash(body)}
    return [
        headless_service(run, name, selector, ports),
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": body},
    ]


def _settings_of(run: AlignmentRun, service: str, folder: Path, index: int) -> Json:
    """Overrides of a service's configuration file: which model of the run it serves at this stage."""
    stage = run.stage_names()[index]
    values: Json = {"precision": run.spec.model.precision, "device": run.spec.model.device}
    if service == "reward":
        return {**values, "scorers": scorers(run, index, folder)}
    values["model"] = str(policy_folder(run, stage, folder) or run.spec.model.base)
    if service == "policy":
        policy = run.spec.services.policy
        values |= {"engine": policy.engine, "kvCacheTokens": policy.kv_cache_tokens}
        if policy.max_context is not None:
            values["maxContext"] = policy.max_context
    return values


def scorers(run: AlignmentRun, index: int, folder: Path) -> list[Json]:
    """What the reward service hosts at a stage: the trained models before it, and the stage's verifiable rewards.

    A stage without a mix of its own (evaluate) is judged by the newest mix before it.
    """
    mixes = [stage.spec.reward for stage in run.spec.stages[: index + 1] if hasattr(stage.spec, "reward")]
    mix: RewardMix = mixes[-1] if mixes else RewardMix()
    models = reward_model_folders(run, run.stage_names()[index], folder)
    learned = [
        {"name": name, "kind": "model", "weight": mix.model_weight, "path": str(path)} for name, path in models.items()
    ]
    checked = [
        {"name": item.name, "kind": "verifiable", "weight": item.weight, "options": item.options}
        for item in mix.verifiable
    ]
    return learned + checked


def stage_objects(run: Manifest, manifest: AlignmentRun, index: int, settings: Settings) -> list[Json]:
    """The Job of a stage; with several workers an Indexed Job and the headless Service of its rendezvous."""
    stage = manifest.stage_names()[index]
    name = object_name(manifest.metadata.name, stage)
    trainer = manifest.spec.trainer
    workers = trainer.workers if manifest.spec.stages[index].kind not in ("evaluate", "release") else 1
    labels = {STAGE_LABEL: stage, RUN_LABEL: manifest.metadata.name, "app.kubernetes.io/component": "trainer"}
    template = _pod(settings.templates["trainer"], labels, trainer.resources)
    pod = template["spec"]
    pod["restartPolicy"] = "Never"
    container = pod["containers"][0]
    folder = str(run_dir(run["metadata"]["namespace"], manifest.metadata.name, settings.storage))
    container["command"] = ["python", "-m", "training.stage"]
    if workers > 1:
        pod["subdomain"] = name
        container["command"] = [
            "torchrun",
            f"--nnodes={workers}",
            f"--nproc-per-node={max(trainer.resources.gpus, 1)}",
            "--node-rank=$(JOB_COMPLETION_INDEX)",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={name}-0.{name}:{RENDEZVOUS_PORT}",
            f"--rdzv-id={name}",
            "--max-restarts=3",
            "-m",
            "training.stage",
        ]
    container["args"] = ["--run-dir", folder, "--stage", stage]
    container["terminationMessagePolicy"] = "FallbackToLogsOnError"
    _add_env(container, {"STEERSMAN_PROGRESS": "json", "STEERSMAN_RUN": manifest.metadata.name})
    prepare = copy.deepcopy(container)
    prepare["name"] = "prepare"
    prepare["command"] = ["python", "-m", "steersman.local.prepare"]
    prepare["args"] = ["--run-dir", folder, "--manifest", f"{MANIFEST_MOUNT}/run.yaml"]
    prepare["resources"] = {}
    prepare.setdefault("volumeMounts", []).append({"name": "manifest", "mountPath": MANIFEST_MOUNT, "readOnly": True})
    pod.setdefault("initContainers", []).append(prepare)
    pod.setdefault("volumes", []).append(
        {"name": "manifest", "configMap": {"name": object_name(manifest.metadata.name, "manifest")}}
    )
    metadata = owned(run, name, labels)
    if trainer.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = trainer.queue
    spec: Json = {
        "backoffLimit": trainer.backoff_limit,
        "parallelism": workers,
        "completions": workers,
        "completionMode": "Indexed" if workers > 1 else "NonIndexed",
        "podFailurePolicy": {
            "rules": [
                # A drained or preempted node is nobody's fault and costs no retry.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": container["name"],
                        "operator": "In",
                        "values": final_exit_codes(),
                    },
                },
            ]
        },
        "template": template,
    }
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    if workers == 1:
        return [job]
    selector = {STAGE_LABEL: stage, RUN_LABEL: manifest.metadata.name}
    return [headless_service(run, name, selector, {"rendezvous": RENDEZVOUS_PORT}), job]


def _pod(template: Json, labels: dict[str, str], resources: Resources) -> Json:
    """A copy of a pod template with the run's labels and the manifest's resources."""
    pod = copy.deepcopy(template)
    meta = pod.setdefault("metadata", {})
    meta["labels"] = {**meta.get("labels", {}), **labels}
    limits = pod["spec"]["containers"][0].setdefault("resources", {})
    requests = limits.setdefault("requests", {})
    caps = limits.setdefault("limits", {})
    if resources.cpu is not None:
        requests["cpu"] = resources.cpu
    if resources.memory is not None:
        requests["memory"] = caps["memory"] = resources.memory
    if resources.gpus:
        requests["nvidia.com/gpu"] = caps["nvidia.com/gpu"] = resources.gpus
    return pod


def _add_env(container: Json, values: dict[str, str]) -> None:
    env = container.setdefault("env", [])
    env.extend({"name": name, "value": value} for name, value in values.items())


def model_uri(run: Manifest, manifest: AlignmentRun, stage: str, storage: Storage) -> str:
    """Where KServe's storage initializer finds the released model."""
    folder = run_dir(run["metadata"]["namespace"], manifest.metadata.name, storage)
    return f"pvc://{storage.claim}/{folder.relative_to(storage.root)}/{stage}/model"
