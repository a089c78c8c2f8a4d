"""The Kubernetes objects of a run: manifest, services, Jobs. Pure functions from the run and the templates."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from services.controller.actions import Json
from services.controller.config import RunCertificates, Storage
from services.controller.model import (
    ONLY_FOR_LABEL,
    POOL_LABEL,
    QUEUE_LABEL,
    RUN_LABEL,
    SPEC_HASH,
    STAGE_LABEL,
    Manifest,
    Settings,
)
from steersman.config.manifest import AlignmentRun, Resources, ServiceSpec
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
from steersman.leaving import LEAVE_SECONDS
from steersman.local.services import services_of
from steersman.rpc.token import RUN_TOKEN

PORTS = {"policy": 50051, "reward": 50052, "reference": 50053}
WEIGHTS_PORT = 50054
RENDEZVOUS_PORT = 29500
MANIFEST_MOUNT = "/etc/steersman/run"
TLS_VOLUME = "tls"
"""The volume of the templates that holds certificates."""

_LASTING = {"ConfigMap": "manifest", "NetworkPolicy": "pods", "Certificate": "tls"}
"""What a run has from its start to its end, and how its name ends."""
_ONE_MACHINE = ("host", "drainSeconds", "threads")
"""Settings of a service that a pod has from the chart."""
_RETRYABLE = {SteersmanError, UnavailableError, DeadlineError, InternalError, RateLimitedError, ConflictError}
"""Errors that a repetition may mend."""


def final_exit_codes() -> list[int]:
    """Exit codes that repeating the stage cannot mend: wrong input, wrong state, no permission, full disk."""
    retryable = {error.exit_code for error in _RETRYABLE} | {CancelledError.exit_code}
    return sorted({error.exit_code for error in all_error_types()} - retryable)


def reason_of_exit(code: int | None) -> str:
    """One word for an exit code, for example `InvalidArgument`; signals by number (137: OutOfMemoryOrKilled)."""
    if code == 137:
        return "OutOfMemoryOrKilled"
    if code is not None and code > 128:
        return f"Signal{code - 128}"
    if code != SteersmanError.exit_code:
        for error in all_error_types():  # parents come before children
            if error.exit_code == code:
                return error.__name__.removesuffix("Error")
    return "StageFailed"


def object_name(run: str, suffix: str) -> str:
    """`<run>-<suffix>`, cut with a digest where a label would not hold it and the index of a pod."""
    name = f"{run}-{suffix}"
    if len(name) <= 57:
        return name
    return f"{name[:48].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_dir(run: Manifest, storage: Storage) -> Path:
    """Folder of a run on the artifacts volume."""
    return Path(storage.root, "runs", run["metadata"]["namespace"], run["metadata"]["name"])


def model_path(run: Manifest, stage: str, storage: Storage) -> str:
    """Folder of the released model, as pods with the artifacts volume see it."""
    return str(run_dir(run, storage) / stage / "model")


def model_uri(run: Manifest, stage: str, storage: Storage) -> str:
    """Where KServe's storage initializer finds the released model."""
    return f"pvc://{storage.claim}/{run_dir(run, storage).relative_to(storage.root)}/{stage}/model"


def owned(run: Manifest, name: str, labels: dict[str, str] | None = None) -> Json:
    """Metadata of an object that goes away with the run."""
    meta = run["metadata"]
    owner = {
        "apiVersion": run["apiVersion"],
        "kind": run["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "name": name,
        "namespace": meta["namespace"],
        "labels": {"app.kubernetes.io/managed-by": "steersman", RUN_LABEL: meta["name"], **(labels or {})},
        "ownerReferences": [owner],
    }


# The manifest that stages read


def endpoints(run: Manifest, manifest: AlignmentRun, service: str) -> list[str]:
    """Addresses that the trainer gets: the manifest's, or those of the run's own pods.

    Every policy replica has an address of its own, because weights go to each; the others are balanced by DNS.
    """
    spec: ServiceSpec = getattr(manifest.spec.services, service)
    if spec.endpoints:
        return list(spec.endpoints)
    name = object_name(manifest.metadata.name, service)
    host = f"{_host(run, manifest, service)}:{PORTS[service]}"
    if service != "policy":
        return [f"dns:///{host}"]
    return [f"{name}-{index}.{host}" for index in range(spec.replicas)]


def _host(run: Manifest, manifest: AlignmentRun, service: str) -> str:
    """DNS name of one of the run's own services."""
    return f"{object_name(manifest.metadata.name, service)}.{run['metadata']['namespace']}.svc"


def cluster_manifest(run: Manifest, manifest: AlignmentRun, settings: Settings) -> Json:
    """The manifest as the stages read it: addresses filled in, relative data files made absolute."""
    body = copy.deepcopy({key: run[key] for key in ("apiVersion", "kind", "spec")})
    body["metadata"] = {"name": manifest.metadata.name, "namespace": run["metadata"]["namespace"]}
    services = body["spec"].setdefault("services", {})
    for service in PORTS:
        spec: ServiceSpec = getattr(manifest.spec.services, service)
        own = not spec.endpoints
        mine = services.setdefault(service, {})
        mine["endpoints"] = endpoints(run, manifest, service)
        if own:
            mine["tokenEnv"] = RUN_TOKEN
        if settings.tls is not None and (own or spec.tls is None):
            mine["tls"] = settings.tls.model_dump(mode="json", by_alias=True)
            # Pods have names of their own below the service's, which one certificate for all runs cannot list.
            mine["tls"]["serverName"] = _host(run, manifest, service) if own else None
    if not manifest.spec.services.policy.endpoints:
        replicas = services["policy"]["endpoints"]
        services["policy"]["weightsEndpoints"] = [f"{item.rpartition(':')[0]}:{WEIGHTS_PORT}" for item in replicas]
    for kind, splits in body["spec"]["data"].items():
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
        "metadata": owned(run, object_name(manifest.metadata.name, _LASTING["ConfigMap"])),
        "immutable": True,
        "data": {"manifest.yaml": text},
    }


def lasting_objects(run: Manifest, manifest: AlignmentRun, settings: Settings) -> list[Json]:
    """What a run has from its start to its end, of each kind one: its manifest, the wall around its pods, its
    certificate."""
    bodies = [manifest_map(run, manifest, settings)]
    if settings.network:
        bodies.append(network_policy(run))
    if settings.certificates is not None:
        bodies.append(certificate(run, manifest, settings.certificates))
    return bodies


def lasting_names(run: Manifest, settings: Settings) -> dict[str, str]:
    """Name of each of the lasting objects, by kind; also of a run whose manifest cannot be read."""
    has = {"ConfigMap": True, "NetworkPolicy": settings.network, "Certificate": settings.certificates is not None}
    return {kind: object_name(run["metadata"]["name"], _LASTING[kind]) for kind in has if has[kind]}


def network_policy(run: Manifest) -> Json:
    """Only the run's own pods reach its trainers and services: ranks meet without a credential of torch's."""
    name = run["metadata"]["name"]
    mine = {"matchLabels": {ONLY_FOR_LABEL: name}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": owned(run, object_name(name, _LASTING["NetworkPolicy"])),
        "spec": {"podSelector": mine, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": mine}]}]},
    }


def certificate(run: Manifest, manifest: AlignmentRun, asked: RunCertificates) -> Json:
    """cert-manager's Certificate of a run: localhost, for probes, and its own services with their pods."""
    hosts = [
        _host(run, manifest, service) for service in PORTS if not getattr(manifest.spec.services, service).endpoints
    ]
    name = object_name(manifest.metadata.name, _LASTING["Certificate"])
    return {
        "apiVersion": "cert-manager.io/v1",
        "kind": "Certificate",
        "metadata": owned(run, name),
        "spec": {
            "secretName": name,
            "secretTemplate": {
                "labels": {"app.kubernetes.io/managed-by": "steersman", RUN_LABEL: manifest.metadata.name}
            },
            "dnsNames": ["localhost", *(name for host in hosts for name in (host, f"*.{host}"))],
            "usages": ["server auth", "client auth"],
            "duration": asked.duration,
            "renewBefore": asked.renew_before,
            "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
            "issuerRef": asked.issuer_ref,
        },
    }


def token_secret(run: Manifest, manifest: AlignmentRun) -> Json:
    """Secret with the token that the run's services ask for; whoever creates it draws it (`DrawToken`)."""
    metadata = owned(run, object_name(manifest.metadata.name, "token"))
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "immutable": True}


def _token_env(manifest: AlignmentRun, *, optional: bool) -> Json:
    """The variable for a container; `optional` for stages, of which not every one has services."""
    source = {"name": object_name(manifest.metadata.name, "token"), "key": "token", "optional": optional}
    return {"name": RUN_TOKEN, "valueFrom": {"secretKeyRef": source}}


# The services that a run starts


def needs(run: Manifest, manifest: AlignmentRun, index: int, storage: Storage) -> dict[str, Json]:
    """Configuration of the services that the run itself must start for a stage, by name; as on one machine."""
    stage = manifest.stage_names()[index]
    base = Path(manifest.spec.model.base)
    return {
        service.name.rpartition("-")[0]: {
            key: value for key, value in service.config.items() if key not in _ONE_MACHINE and value is not None
        }
        for service in services_of(manifest, stage, run_dir(run, storage), base)
    }


def service_objects(
    run: Manifest, manifest: AlignmentRun, service: str, config: Json, settings: Settings, stage: str
) -> tuple[Json, Json]:
    """Headless Service and StatefulSet of one service; the StatefulSet carries a hash of its spec, and the stage."""
    name = object_name(manifest.metadata.name, service)
    spec: ServiceSpec = getattr(manifest.spec.services, service)
    labels = {POOL_LABEL: manifest.metadata.name, "app.kubernetes.io/component": service}
    of_pods = {**labels, RUN_LABEL: manifest.metadata.name, ONLY_FOR_LABEL: manifest.metadata.name}
    template = _pod(run, settings.templates[service], of_pods, spec.resources, settings)
    container = template["spec"]["containers"][0]
    container["args"] = [
        *(container.get("args") or []),
        *(part for key, value in config.items() for part in ("--set", f"{key}={json.dumps(value)}")),
    ]
    container.setdefault("env", []).append(_token_env(manifest, optional=False))
    body: Json = {
        "replicas": spec.replicas,
        "serviceName": name,
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": labels},
        "template": template,
    }
    metadata = owned(run, name, {"app.kubernetes.io/component": service})
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    metadata["annotations"] = {SPEC_HASH: digest, STAGE_LABEL: stage}
    ports = {"grpc": PORTS[service], **({"grpc-weights": WEIGHTS_PORT} if service == "policy" else {})}
    return (
        _headless_service(run, name, labels, ports),
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": body},
    )


def _headless_service(run: Manifest, name: str, selector: dict[str, str], ports: dict[str, int]) -> Json:
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


# What a stage takes


def _workers(manifest: AlignmentRun, index: int) -> int:
    return manifest.spec.trainer.workers if manifest.spec.stages[index].spec.shared_by_ranks else 1


def takes_several_pods(run: Manifest, manifest: AlignmentRun, index: int, storage: Storage) -> bool:
    """Whether a stage needs more than one pod at the same time, and could hold some while it waits for others."""
    return _workers(manifest, index) > 1 or bool(needs(run, manifest, index, storage))


def workload(run: Manifest, manifest: AlignmentRun, index: int, settings: Settings) -> Json:
    """Kueue's Workload for all pods of a stage: its queue admits services and Job together, or not at all."""
    stage = manifest.stage_names()[index]
    job = stage_objects(run, manifest, index, settings, queued=False)[-1]
    sets = [("trainer", _workers(manifest, index), job["spec"]["template"])]
    for service, config in needs(run, manifest, index, settings.storage).items():
        body = service_objects(run, manifest, service, config, settings, stage)[-1]["spec"]
        sets.append((service, body["replicas"], body["template"]))
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "Workload",
        "metadata": owned(run, object_name(manifest.metadata.name, "workload"), {STAGE_LABEL: stage}),
        "spec": {
            "queueName": manifest.spec.trainer.queue,
            "podSets": [{"name": name, "count": count, "template": template} for name, count, template in sets],
        },
    }


# The Job of a stage


def stage_objects(
    run: Manifest, manifest: AlignmentRun, index: int, settings: Settings, *, queued: bool | None = None
) -> list[Json]:
    """The Job of a stage; with several workers an Indexed Job and the headless Service of its rendezvous.

    Args:
        queued: Kueue admits the Job itself; None: where no Workload stands for more pods than the Job's.
    """
    stage = manifest.stage_names()[index]
    name = object_name(manifest.metadata.name, stage)
    trainer = manifest.spec.trainer
    workers = _workers(manifest, index)
    identity = {STAGE_LABEL: stage, RUN_LABEL: manifest.metadata.name}
    labels = {**identity, "app.kubernetes.io/component": "trainer"}
    template = _stage_pod(run, manifest, stage, labels, settings)
    container = template["spec"]["containers"][0]
    if workers > 1:
        template["spec"]["subdomain"] = name
        container["command"] = [
            *("python", "-m", "training.ranks"),  # torchrun with the exit code of the rank that failed
            f"--nnodes={workers}",
            f"--nproc-per-node={max(trainer.resources.gpus, 1)}",
            "--node-rank=$(JOB_COMPLETION_INDEX)",
            "--rdzv-backend=static",  # c10d's unpickles what it is sent
            "--rdzv-conf=timeout=1800",
            f"--rdzv-endpoint={name}-0.{name}:{RENDEZVOUS_PORT}",
            f"--rdzv-id={name}",
            "--max-restarts=0",  # the Job decides, by the exit code
            "-m",
            "training.stage",
        ]
    metadata = owned(run, name, labels)
    if queued is None:
        queued = not needs(run, manifest, index, settings.storage)
    if trainer.queue is not None and queued:
        metadata["labels"][QUEUE_LABEL] = trainer.queue
    exits = {"operator": "In", "values": final_exit_codes()}  # of any container: `prepare` refuses wrong data
    spec: Json = {
        "backoffLimit": trainer.backoff_limit * workers,  # a rank that is lost ends all of them
        "parallelism": workers,
        "completions": workers,
        "completionMode": "Indexed" if workers > 1 else "NonIndexed",
        "podFailurePolicy": {
            "rules": [
                # A drained or preempted node is nobody's fault and costs no retry.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": exits},
            ]
        },
        "template": template,
    }
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    if workers == 1:
        return [job]
    return [_headless_service(run, name, identity, {"rendezvous": RENDEZVOUS_PORT}), job]


def _stage_pod(run: Manifest, manifest: AlignmentRun, stage: str, labels: dict[str, str], settings: Settings) -> Json:
    """The pod of a stage: it puts manifest, base model and data into the run's folder, then runs the stage."""
    mine = {**labels, ONLY_FOR_LABEL: manifest.metadata.name}
    template = _pod(run, settings.templates["trainer"], mine, manifest.spec.trainer.resources, settings)
    pod = template["spec"]
    pod["restartPolicy"] = "Never"
    pod["terminationGracePeriodSeconds"] = int(LEAVE_SECONDS) + 10
    folder = run_dir(run, settings.storage)
    container = pod["containers"][0]
    container["terminationMessagePolicy"] = "FallbackToLogsOnError"  # the end of the log, without a right to read logs
    container.setdefault("env", []).extend(
        {"name": key, "value": value}
        for key, value in (("STEERSMAN_PROGRESS", "json"), ("STEERSMAN_RUN", manifest.metadata.name))
    )
    container["env"].append(_token_env(manifest, optional=True))
    prepare = copy.deepcopy(container)
    prepare["name"] = "prepare"
    prepare["command"] = ["sh", "-euc"]
    copied = f"cp {MANIFEST_MOUNT}/manifest.yaml {folder}/.manifest.yaml.$HOSTNAME"
    prepare["args"] = [
        f"mkdir -p {folder}; {copied}; mv {folder}/.manifest.yaml.$HOSTNAME {folder}/manifest.yaml; "
        f"exec python -m steersman.local.prepare {folder}/manifest.yaml"
    ]
    prepare.setdefault("volumeMounts", []).append({"name": "manifest", "mountPath": MANIFEST_MOUNT, "readOnly": True})
    pod.setdefault("initContainers", []).append(prepare)
    pod.setdefault("volumes", []).append(
        {"name": "manifest", "configMap": {"name": object_name(manifest.metadata.name, _LASTING["ConfigMap"])}}
    )
    container["command"] = ["python", "-m", "training.stage"]
    container["args"] = ["--run-dir", str(folder), "--stage", stage]
    return template


TIDY = "tidy"
"""What the Job that removes a run's files is called, where stages have their name."""


def tidy_job(run: Manifest, manifest: AlignmentRun, settings: Settings) -> Json:
    """A Job that leaves of the run's folder what the manifest keeps."""
    labels = {STAGE_LABEL: TIDY, RUN_LABEL: manifest.metadata.name, "app.kubernetes.io/component": "trainer"}
    template = _pod(run, settings.templates["trainer"], labels, Resources(), settings)
    template["spec"]["restartPolicy"] = "Never"
    container = template["spec"]["containers"][0]
    container["terminationMessagePolicy"] = "FallbackToLogsOnError"
    container["command"] = ["python", "-m", "steersman.local.tidy"]
    keep = ["--keep-released"] if manifest.spec.ttl_keeps == "released" else []
    container["args"] = [*keep, str(run_dir(run, settings.storage))]
    for kind in ("requests", "limits"):  # it needs no accelerator
        wanted = (container.get("resources") or {}).get(kind) or {}
        container["resources"][kind] = {key: value for key, value in wanted.items() if "/" not in key}
    name = object_name(manifest.metadata.name, TIDY)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": owned(run, name, labels),
        "spec": {"backoffLimit": 3, "template": template},
    }


def _pod(run: Manifest, template: Json, labels: dict[str, str], resources: Resources, settings: Settings) -> Json:
    """A copy of a pod template with the run's labels and certificate, and the manifest's resources."""
    pod = copy.deepcopy(template)
    meta = pod.setdefault("metadata", {})
    meta["labels"] = {**meta.get("labels", {}), **labels}
    mine: dict[str, Any] = pod["spec"]["containers"][0].setdefault("resources", {})
    requests, limits = mine.setdefault("requests", {}), mine.setdefault("limits", {})
    if resources.cpu is not None:
        requests["cpu"] = resources.cpu
    if resources.memory is not None:
        requests["memory"] = limits["memory"] = resources.memory
    if resources.gpus:
        requests[settings.gpu_resource] = limits[settings.gpu_resource] = resources.gpus
    if settings.certificates is not None:
        for volume in pod["spec"].get("volumes") or []:
            if volume["name"] == TLS_VOLUME:
                volume["secret"]["secretName"] = object_name(run["metadata"]["name"], _LASTING["Certificate"])
    return pod
