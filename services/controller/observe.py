"""From Kubernetes objects to what the planner sees."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import datetime
from typing import Any

from services.controller.actions import Json
from services.controller.endpoint import Endpoint
from services.controller.kserve import KServeEndpoint
from services.controller.kube import Kube
from services.controller.model import (
    QUEUE_LABEL,
    RUN_LABEL,
    SPEC_HASH,
    STAGE_LABEL,
    JobState,
    Manifest,
    Observed,
    Progress,
    SetState,
    Settings,
    Signals,
    WorkloadState,
)
from services.controller.objects import final_exit_codes, lasting_names, object_name
from services.controller.plan import parse_run, read_status
from services.controller.release import candidate_name
from services.controller.signals import LiveSignals
from services.controller.split import SplitEndpoint, split_name
from services.controller.status import TERMINAL, parse_time
from services.controller.trouble import find_trouble
from services.controller.turns import Peer
from steersman.config.manifest import Canary, ReleaseStage
from steersman.errors import ConfigError, UnavailableError

log = logging.getLogger("steersman.controller")

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


async def observe(
    kube: Kube, run: Manifest, signals: LiveSignals | None, settings: Settings, now: datetime
) -> Observed:
    """Reads everything that belongs to a run."""
    namespace, name = run["metadata"]["namespace"], run["metadata"]["name"]
    selector = f"{RUN_LABEL}={name}"
    jobs, pods, sets, runs = await asyncio.gather(
        kube.list("Job", namespace, selector),
        kube.list("Pod", namespace, selector),
        kube.list("StatefulSet", namespace, selector),
        kube.list("AlignmentRun", namespace),
    )
    lasting = {kind: await kube.get(kind, namespace, name) for kind, name in lasting_names(run, settings).items()}
    endpoint = await _endpoint(kube, run)
    events = await _events(kube, namespace, pods, jobs, sets)
    return Observed(
        jobs={
            job["metadata"]["labels"][STAGE_LABEL]: await _job_state(kube, job, pods, events)
            for job in jobs
            if STAGE_LABEL in job["metadata"].get("labels", {})
        },
        services={
            item["metadata"]["labels"]["app.kubernetes.io/component"]: set_state(item, pods, events)
            for item in sets
            if is_owned(item, run)
        },
        present=frozenset(kind for kind, found in lasting.items() if found is not None and is_owned(found, run)),
        endpoint=endpoint,
        peers=_peers(run, runs),
        workload=await _workload(kube, run),
        signals=await _signals(signals, run, endpoint, now),
    )


def _peers(run: Manifest, runs: list[Json]) -> tuple[Peer, ...]:
    """The other runs that are not over, where they stand."""
    found = []
    for other in runs:
        status = read_status(other)
        meta = other["metadata"]
        if meta["uid"] != run["metadata"]["uid"] and status.phase not in TERMINAL and status.turn is not None:
            found.append(Peer(meta["name"], (status.turn_time or "", meta["uid"]), status.turn))
    return tuple(found)


async def _events(kube: Kube, namespace: str, pods: list[Json], *makers: list[Json]) -> list[Json]:
    """Warnings of the namespace, where something of the run does not come up."""
    wanted = sum(_wanted_pods(item) for items in makers for item in items)
    running = sum((pod.get("status") or {}).get("phase") == "Running" for pod in pods)
    if running >= wanted:
        return []
    events = await kube.list("Event", namespace)
    return [event for event in events if event.get("type") == "Warning" and "involvedObject" in event]


def _wanted_pods(item: Json) -> int:
    spec, status = item["spec"], item.get("status") or {}
    if any(entry["type"] in ("Complete", "Failed") for entry in status.get("conditions") or []):
        return 0
    return int(spec.get("parallelism") or spec.get("replicas") or 0)


async def _endpoint(kube: Kube, run: Manifest) -> Endpoint | None:
    """What the run's release stage names, as it is now; None: nothing, or it does not exist."""
    namespace, name = run["metadata"]["namespace"], run["metadata"]["name"]
    for stage in run["spec"].get("stages") or []:
        release = stage.get("release") or {}
        if release.get("inferenceService"):
            service = await kube.get("InferenceService", namespace, release["inferenceService"])
            return KServeEndpoint(service, name) if service is not None else None
        if release.get("deployment"):
            deployment = await kube.get("Deployment", namespace, release["deployment"])
            if deployment is None:
                return None
            split = await kube.get("ConfigMap", namespace, split_name(release["deployment"]))
            candidate = await kube.get("Deployment", namespace, candidate_name(run))
            mine = candidate if candidate is not None and is_owned(candidate, run) else None
            return SplitEndpoint(run, deployment, split, mine)
    return None


async def _workload(kube: Kube, run: Manifest) -> WorkloadState | None:
    """Kueue's view of the stage; None where the run has no queue, or nothing was asked of it."""
    if not (run["spec"].get("trainer") or {}).get("queue"):
        return None
    meta = run["metadata"]
    found = await kube.get("Workload", meta["namespace"], object_name(meta["name"], "workload"))
    return workload_state(found) if found is not None and is_owned(found, run) else None


def workload_state(item: Json) -> WorkloadState:
    """The planner's view of a Workload: admission and eviction are conditions of it."""
    conditions = {entry["type"]: entry for entry in (item.get("status") or {}).get("conditions") or []}
    holds = {kind for kind, entry in conditions.items() if entry.get("status") == "True"}
    return WorkloadState(
        stage=item["metadata"].get("labels", {}).get(STAGE_LABEL, ""),
        admitted="Admitted" in holds and "Evicted" not in holds,
        evicted="Evicted" in holds or "deletionTimestamp" in item["metadata"],
        message=(conditions.get("QuotaReserved") or {}).get("message", "") if "QuotaReserved" not in holds else "",
    )


async def _signals(
    source: LiveSignals | None, run: Manifest, endpoint: Endpoint | None, now: datetime
) -> Signals | None:
    """None while they cannot be had: a release holds then, and everything else goes on."""
    release = read_status(run).release
    limits = _canary_limits(run)
    if source is None or endpoint is None or release is None or release.counted_since is None or limits is None:
        return None
    if release.decision is not None:
        return None
    since, ratio = parse_time(release.counted_since), limits.max_latency_ratio
    try:
        return await source.read(endpoint, run["metadata"]["namespace"], candidate_name(run), ratio, since, now)
    except UnavailableError as error:
        log.warning("%s: live signals are missing (%s)", run["metadata"]["name"], error)
    except Exception:
        log.exception("%s: live signals cannot be read", run["metadata"]["name"])
    return None


def _canary_limits(run: Manifest) -> Canary | None:
    try:
        stages = parse_run(run).stages()
    except ConfigError:
        return None
    return next((stage.canary for _, stage in stages if isinstance(stage, ReleaseStage)), None)


async def _job_state(kube: Kube, job: Json, pods: list[Json], events: list[Json]) -> JobState:
    stage = job["metadata"]["labels"][STAGE_LABEL]
    mine = [pod for pod in pods if pod["metadata"].get("labels", {}).get(STAGE_LABEL) == stage]
    mine.sort(key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
    running = [pod for pod in mine if pod.get("status", {}).get("phase") == "Running"]
    progress = Progress()
    if running:
        first = min(running, key=lambda pod: pod["metadata"]["name"])  # rank 0 reports
        text = await kube.pod_log(first["metadata"]["namespace"], first["metadata"]["name"], _PROGRESS_LINES)
        progress = read_progress(text)
    return job_state(job, mine, events, progress)


def job_state(job: Json, pods: list[Json], events: list[Json], progress: Progress) -> JobState:
    """The planner's view of a Job, the last failure among its pods and what holds them up.

    Args:
        job: the Job.
        pods: its pods, oldest first.
        events: warnings of the namespace.
        progress: what the first pod says.
    """
    status = job.get("status") or {}
    true = {item["type"]: item for item in status.get("conditions") or [] if item["status"] == "True"}
    owners = job["metadata"].get("ownerReferences") or [{}]
    failure = last_failure(pods)
    log = failure.get("message") if failure else None
    queue = queue_reason(job)
    makers = [("Job", job["metadata"]["name"])]
    return JobState(
        owner=owners[0].get("uid", ""),
        terminating="deletionTimestamp" in job["metadata"],
        complete="Complete" in true,
        failed="Failed" in true,
        failed_pods=status.get("failed", 0),
        exit_code=failure.get("exitCode") if failure else None,
        pod_reason=killed_by(pods),
        job_reason=true.get("Failed", {}).get("reason"),
        log=tail(log) if log else None,
        waiting=queue,
        wanted=job["spec"].get("parallelism") or 1,
        running=sum((pod.get("status") or {}).get("phase") == "Running" for pod in pods),
        trouble=None if queue else find_trouble(pods, events, makers),
        progress=progress,
    )


def set_state(item: Json, pods: list[Json], events: list[Json]) -> SetState:
    """The planner's view of a StatefulSet and of what holds its pods up."""
    meta, spec, status = item["metadata"], item["spec"], item.get("status") or {}
    replicas = spec.get("replicas", 1)
    current = status.get("observedGeneration", 0) >= meta.get("generation", 0)
    updated = status.get("updatedReplicas", 0) >= replicas
    ready = replicas > 0 and current and updated and status.get("readyReplicas", 0) >= replicas
    labels = spec["selector"]["matchLabels"]
    mine = [pod for pod in pods if labels.items() <= pod["metadata"].get("labels", {}).items()]
    annotations = meta.get("annotations") or {}
    return SetState(
        spec_hash=annotations.get(SPEC_HASH, ""),
        replicas=replicas,
        ready=ready,
        stage=annotations.get(STAGE_LABEL, ""),
        trouble=None if ready or not replicas else find_trouble(mine, events, [("StatefulSet", meta["name"])]),
    )


def killed_by(pods: list[Json]) -> str | None:
    """Why the newest failed pod was ended from outside: out of memory, evicted, preempted; None: by itself."""
    for pod in reversed(pods):
        status = pod.get("status") or {}
        if status.get("phase") != "Failed":
            continue
        for container in [*(status.get("containerStatuses") or []), *(status.get("initContainerStatuses") or [])]:
            ended = (container.get("state") or {}).get("terminated") or {}
            if ended.get("reason") == "OOMKilled":
                return "OOMKilled"
        disrupted = [entry for entry in status.get("conditions") or [] if entry.get("type") == "DisruptionTarget"]
        reasons = [entry.get("reason") for entry in disrupted if entry.get("status") == "True"]
        return next((str(reason) for reason in [status.get("reason"), *reasons] if reason), None)
    return None


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


def is_owned(item: Manifest, run: Manifest) -> bool:
    """Whether an object belongs to a run: by uid, not by name."""
    uid = run["metadata"]["uid"]
    return any(owner.get("uid") == uid for owner in item["metadata"].get("ownerReferences") or [])
