"""From Kubernetes objects to what the planner sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from services.controller.kube import Kube
from services.controller.model import (
    QUEUE_LABEL,
    RUN_LABEL,
    SPEC_HASH,
    STAGE_LABEL,
    JobState,
    Json,
    Manifest,
    Observed,
    Progress,
    SetState,
)
from services.controller.objects import final_exit_codes, object_name
from services.controller.plan import read_status
from services.controller.release import candidate_name
from services.controller.signals import LiveSignals
from services.controller.status import parse_time
from steersman.errors import UnavailableError

LOG_LINES = 20
"""Lines of a failed pod's log that the status keeps."""
_PROGRESS_LINES = 50
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_LOG_CHARS = 2048


def as_written(run: Manifest) -> Manifest:
    """The run with the nulls of its manifest, such as `lora: null`.

    `kubectl apply` (without `--server-side`) leaves them out of an object that it creates, though they mean something
    else than nothing; its annotation keeps what was written.
    """
    try:
        written = json.loads(run["metadata"]["annotations"][_LAST_APPLIED])["spec"]
    except (KeyError, TypeError, ValueError):
        return run
    return {**run, "spec": _with_nulls(run["spec"], written)}


def _with_nulls(stored: Any, written: Any) -> Any:
    if isinstance(stored, dict) and isinstance(written, dict):
        nulls = {key: None for key, value in written.items() if value is None and key not in stored}
        return {key: _with_nulls(value, written.get(key)) for key, value in stored.items()} | nulls
    if isinstance(stored, list) and isinstance(written, list) and len(stored) == len(written):
        return [_with_nulls(*pair) for pair in zip(stored, written, strict=True)]
    return stored


async def observe(kube: Kube, run: Manifest, signals: LiveSignals | None, now: datetime) -> Observed:
    """Reads everything that belongs to a run, from the API server and not from a cache."""
    namespace, name = run["metadata"]["namespace"], run["metadata"]["name"]
    selector = f"{RUN_LABEL}={name}"
    jobs, pods, sets = await asyncio.gather(
        kube.list("Job", namespace, selector),
        kube.list("Pod", namespace, selector),
        kube.list("StatefulSet", namespace, selector),
    )
    manifest = await kube.get("ConfigMap", namespace, object_name(name, "manifest"))
    service_name = released_service(run)
    service = await kube.get("InferenceService", namespace, service_name) if service_name else None
    return Observed(
        jobs={
            job["metadata"]["labels"][STAGE_LABEL]: await _job_state(kube, job, pods)
            for job in jobs
            if STAGE_LABEL in job["metadata"].get("labels", {})
        },
        services={
            item["metadata"]["labels"]["app.kubernetes.io/component"]: set_state(item)
            for item in sets
            if _is_owned(item, run)
        },
        has_manifest=manifest is not None and _is_owned(manifest, run),
        inference_service=service,
        signals=await _signals(signals, run, service, now),
    )


def released_service(run: Manifest) -> str | None:
    """Name of the InferenceService of the run's release stage."""
    for stage in run["spec"].get("stages") or []:
        release = stage.get("release")
        if release and release.get("inferenceService"):
            return str(release["inferenceService"])
    return None


async def _signals(source: LiveSignals | None, run: Manifest, service: Manifest | None, now: datetime):
    release = read_status(run).release
    if source is None or service is None or release is None or release.ready_time is None:
        return None
    try:
        return await source.read(service, candidate_name(run), parse_time(release.ready_time), now)
    except UnavailableError:
        return None


async def _job_state(kube: Kube, job: Json, pods: list[Json]) -> JobState:
    stage = job["metadata"]["labels"][STAGE_LABEL]
    mine = [pod for pod in pods if pod["metadata"].get("labels", {}).get(STAGE_LABEL) == stage]
    mine.sort(key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
    failure = last_failure(mine)
    log = failure.get("message") if failure else None
    running = [pod for pod in mine if pod.get("status", {}).get("phase") == "Running"]
    progress = Progress()
    if running:
        first = min(running, key=lambda pod: pod["metadata"]["name"])  # rank 0 reports
        text = await kube.pod_log(first["metadata"]["namespace"], first["metadata"]["name"], _PROGRESS_LINES)
        progress = read_progress(text)
    return job_state(job, failure, log, progress, queue_reason(job) or waiting_reason(mine))


def job_state(
    job: Json, failure: Mapping[str, Any] | None, log: str | None, progress: Progress, waiting: str | None
) -> JobState:
    """The planner's view of a Job and the last failure among its pods."""
    status = job.get("status") or {}
    true = {item["type"]: item for item in status.get("conditions") or [] if item["status"] == "True"}
    owners = job["metadata"].get("ownerReferences") or [{}]
    return JobState(
        owner=owners[0].get("uid", ""),
        terminating="deletionTimestamp" in job["metadata"],
        complete="Complete" in true,
        failed="Failed" in true,
        failed_pods=status.get("failed", 0),
        exit_code=failure.get("exitCode") if failure else None,
        job_reason=true.get("Failed", {}).get("reason"),
        log=tail(log) if log else None,
        waiting=waiting,
        progress=progress,
    )


def set_state(item: Json) -> SetState:
    meta, spec, status = item["metadata"], item["spec"], item.get("status") or {}
    replicas = spec.get("replicas", 1)
    current = status.get("observedGeneration", 0) >= meta.get("generation", 0)
    updated = status.get("updatedReplicas", 0) >= replicas
    return SetState(
        spec_hash=(meta.get("annotations") or {}).get(SPEC_HASH, ""),
        replicas=replicas,
        ready=replicas > 0 and current and updated and status.get("readyReplicas", 0) >= replicas,
    )


def last_failure(pods: list[Json]) -> Json | None:
    """The terminated state of a failed container: exit code and, as message, the end of its log.

    The newest one whose exit code no repetition mends, otherwise the newest one: where several ranks fail together,
    one has the cause and the others only lost their peer.
    """
    failures = _failures(pods)
    final = set(final_exit_codes())
    return next((ended for ended in failures if ended["exitCode"] in final), failures[0] if failures else None)


def _failures(pods: list[Json]) -> list[Json]:
    """Terminated states with an error, newest pod first."""
    found = []
    for pod in reversed(pods):
        status = pod.get("status") or {}
        for container in [*(status.get("containerStatuses") or []), *(status.get("initContainerStatuses") or [])]:
            for state in (container.get("state") or {}, container.get("lastState") or {}):
                ended = state.get("terminated")
                if ended and ended.get("exitCode", 0) != 0:
                    found.append(ended)
    return found


def queue_reason(job: Manifest) -> str | None:
    """Kueue holds a Job of its queue suspended until there is room."""
    queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL)
    if queue is None or not job["spec"].get("suspend"):
        return None
    return f"waiting in the queue {queue}"


def waiting_reason(pods: list[Json]) -> str | None:
    """Why the newest pod does not run: unschedulable, image pull, crash loop."""
    for pod in reversed(pods):
        status = pod.get("status") or {}
        if status.get("phase") != "Pending":
            continue
        for condition in status.get("conditions") or []:
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                return f"{condition.get('reason')}: {condition.get('message', '')}".rstrip(": ")
        for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
            waiting = (container.get("state") or {}).get("waiting")
            if waiting and waiting.get("reason") not in ("PodInitializing", "ContainerCreating"):
                return f"{waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
    return None


def read_progress(log: str) -> Progress:
    """The newest progress line; reward and KL from the newest line that has them."""
    values: dict[str, Any] = {}
    for line in reversed(log.splitlines()):
        if not line.startswith("{"):
            continue
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") != "progress":
            continue
        for key in ("step", "total", "reward", "kl", "tokens_per_s"):
            if event.get(key) is not None:
                values.setdefault(key, event[key])
    return Progress(
        step=values.get("step"),
        total=values.get("total"),
        reward=values.get("reward"),
        kl=values.get("kl"),
        tokens_per_second=values.get("tokens_per_s"),
    )


def tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-LOG_LINES:])[-_LOG_CHARS:]


def _is_owned(item: Manifest, run: Manifest) -> bool:
    uid = run["metadata"]["uid"]
    return any(owner.get("uid") == uid for owner in item["metadata"].get("ownerReferences") or [])
