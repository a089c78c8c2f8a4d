"""Why pods do not run: from their conditions, their containers' states and the events about them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]

_ON_ITS_WAY = ("PodInitializing", "ContainerCreating")
_HOPELESS = {
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "FailedCreate",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
    "OOMKilled",
    "Restarted",
    "RunContainerError",
}
"""What only a person mends; waiting for room, for a claim or for quota may end by itself."""
_TOLD = {
    "FailedAttachVolume",
    "FailedBinding",
    "FailedCreate",
    "FailedCreatePodSandBox",
    "FailedMount",
    "FailedScheduling",
    "ProvisioningFailed",
}
"""Warning events that explain why a pod does not come up; a failed probe does not, while a model loads."""
_CHARS = 400


@dataclass(frozen=True)
class Trouble:
    reason: str
    """One word, as Kubernetes says it."""
    message: str = ""

    @property
    def hopeless(self) -> bool:
        """It does not end without a person."""
        return self.reason in _HOPELESS

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}".rstrip(": ")


def find_trouble(pods: Sequence[Json], events: Sequence[Json], makers: Iterable[tuple[str, str]]) -> Trouble | None:
    """What holds up a group of pods; None: nothing is known against it.

    Args:
        pods: the pods that there are; those that have ended count no more.
        events: warning events of the namespace.
        makers: kind and name of the objects that make these pods, which are told where one is refused.
    """
    alive = [pod for pod in pods if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]
    for pod in sorted(alive, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), reverse=True):
        found = pod_trouble(pod)
        if found is not None:
            return found
    waiting = [pod for pod in alive if (pod.get("status") or {}).get("phase") != "Running"]
    if alive and not waiting:
        return None
    about = set(makers) if not alive else set()
    about |= {("Pod", pod["metadata"]["name"]) for pod in waiting}
    about |= {("PersistentVolumeClaim", claim) for pod in waiting for claim in _claims(pod)}
    told = [
        event
        for event in events
        if event.get("reason") in _TOLD
        and (event["involvedObject"].get("kind", ""), event["involvedObject"].get("name", "")) in about
    ]
    return _of_event(max(told, key=_time_of)) if told else None


def pod_trouble(pod: Json) -> Trouble | None:
    """What a pod says about itself."""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            message = _short(condition.get("message"))
            unbound = "PersistentVolumeClaim" in message or "persistentvolumeclaim" in message
            return Trouble("UnboundClaim" if unbound else str(condition.get("reason") or "Unschedulable"), message)
    for container in _containers(status):
        last = (container.get("lastState") or {}).get("terminated")
        waiting = (container.get("state") or {}).get("waiting")
        if waiting and waiting.get("reason") and waiting["reason"] not in _ON_ITS_WAY:
            message = _short(waiting.get("message"))
            ended = f"{message}; it ended by {end_of(last, _limit(pod, container))}" if last else message
            return Trouble(waiting["reason"], ended)
        if last and not container.get("ready"):
            reason = "OOMKilled" if last.get("reason") == "OOMKilled" else "Restarted"
            times = container.get("restartCount", 1)
            return Trouble(reason, f"{times} times; it ended by {end_of(last, _limit(pod, container))}")
    return None


def end_of(terminated: Json, memory_limit: str | None = None) -> str:
    """How a container ended, in a few words and with its own last one."""
    code = terminated.get("exitCode")
    if terminated.get("reason") == "OOMKilled":
        return f"OOMKilled (memory limit {memory_limit})" if memory_limit else "OOMKilled"
    said = [line.strip() for line in str(terminated.get("message") or "").splitlines() if line.strip()]
    return f"exit code {code}" + (f": {_short(said[-1])}" if said else "")


def _of_event(event: Json) -> Trouble:
    reason, message = str(event["reason"]), _short(event.get("message"))
    if "exceeded quota" in message:
        return Trouble("QuotaExceeded", message)
    if reason in ("FailedBinding", "ProvisioningFailed"):
        return Trouble("UnboundClaim", message)
    return Trouble("Unschedulable" if reason == "FailedScheduling" else reason, message)


def _containers(status: Json) -> Iterator[Json]:
    yield from status.get("initContainerStatuses") or []
    yield from status.get("containerStatuses") or []


def _limit(pod: Json, container: Json) -> str | None:
    spec = pod.get("spec") or {}
    for wanted in [*(spec.get("containers") or []), *(spec.get("initContainers") or [])]:
        if wanted.get("name") == container.get("name"):
            return ((wanted.get("resources") or {}).get("limits") or {}).get("memory")
    return None


def _claims(pod: Json) -> Iterator[str]:
    for volume in (pod.get("spec") or {}).get("volumes") or []:
        if volume.get("persistentVolumeClaim"):
            yield volume["persistentVolumeClaim"]["claimName"]


def _time_of(event: Json) -> str:
    series = (event.get("series") or {}).get("lastObservedTime")
    return str(series or event.get("lastTimestamp") or event.get("eventTime") or "")


def _short(text: Any) -> str:
    words = " ".join(str(text or "").split())
    return words if len(words) <= _CHARS else words[: _CHARS - 1] + "…"
