"""The release: approval, canary steps, watching, promotion or rollback. Pure.

    waiting -> approved -> 10 % -> 50 % -> 100 % -> Promoted
                             \\-- errors, latency, thumbs down --> RolledBack

KServe (Standard mode, 0.20 and newer) runs each entry of `spec.canary` as a Deployment of its own and splits the
traffic. Promotion renames the stable predictor to the canary's name and removes the entry, which moves the running
pods over without a restart (pkg/apis/serving/v1beta1/inference_service.go). Missing signals never promote.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from services.controller.model import APPROVE, Action, Event, Json, Manifest, Observed, Patch, SetAlias, Settings
from services.controller.status import Phase, ReleaseStatus, VariantSignals, format_time, parse_time
from steersman.config.manifest import Canary, ReleaseStage

START_LIMIT = timedelta(minutes=30)
"""A candidate that is not ready by then is taken back."""
MIN_REQUESTS = 20
"""Requests below which error rate and latency say nothing."""


@dataclass(frozen=True)
class Release:
    """State of the release after one look at it."""

    status: ReleaseStatus
    phase: Phase
    message: str
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    outcome: Literal["Promoted", "RolledBack"] | None = None
    holds_canary: bool = field(default=False)
    """The InferenceService carries, or is about to carry, this run's canary: it must be cleaned when the run goes."""


def candidate_name(run: Manifest) -> str:
    """Name of the canary predictor; different for every run, also for two of the same name."""
    return "c" + hashlib.sha256(run["metadata"]["uid"].encode()).hexdigest()[:8]


def remove_canary(service: Manifest, candidate: str) -> Patch | None:
    """Takes this run's entry out of `spec.canary`; None when it is not there."""
    entries = service["spec"].get("canary") or []
    rest = [entry for entry in entries if entry["predictor"].get("name") != candidate]
    return None if len(rest) == len(entries) else _patch(service, {"canary": rest or None})


def verdict(signals: VariantSignals, champion: VariantSignals | None, limits: Canary) -> str | None:
    """Why the candidate must be taken back; None while nothing speaks against it."""
    if signals.requests >= MIN_REQUESTS:
        if signals.error_rate > limits.max_error_rate:
            return f"{signals.error_rate:.1%} of the requests failed, more than {limits.max_error_rate:.1%}"
        if champion is not None and champion.latency_seconds and signals.latency_seconds:
            ratio = signals.latency_seconds / champion.latency_seconds
            if ratio > limits.max_latency_ratio:
                return f"the median latency is {ratio:.2f} times the champion's, more than {limits.max_latency_ratio:g}"
    if champion is not None and signals.feedback >= max(limits.min_feedback, 1) and champion.feedback > 0:
        increase = signals.thumbs_down_share - champion.thumbs_down_share
        if increase > limits.max_thumbs_down_increase:
            limit = limits.max_thumbs_down_increase
            return f"thumbs down rose by {increase:.1%} over the champion's, more than {limit:.1%}"
    return None


def plan_release(
    run: Manifest,
    stage: ReleaseStage,
    model: str,
    status: ReleaseStatus | None,
    observed: Observed,
    settings: Settings,
    now: datetime,
) -> Release:
    """One look at the release of a model that is written and has passed its gates.

    Args:
        run: the AlignmentRun.
        stage: its release stage, with an InferenceService.
        model: storage URI of the released model.
        status: what the last look left; None at the first.
        observed: the cluster.
        settings: what the controller can do.
        now: time of this look.
    """
    service = observed.inference_service
    name = stage.inference_service
    if status is None:
        status = ReleaseStatus(candidate=candidate_name(run), model=model)
        registered = _step(status, "Releasing", "registered the candidate", SetAlias("candidate"))
        if service is None:
            return registered
        status = status.model_copy(update={"previous_model": _model_of(service)})
        return Release(
            status,
            "Releasing",
            "registered the candidate",
            registered.actions,
            (Event("CandidateRegistered", f"{model} is the candidate for {name}"),),
        )
    if service is None:
        return _step(status, "Releasing", f"waiting for the InferenceService {name}, which does not exist")
    if status.previous_model is None:
        status = status.model_copy(update={"previous_model": _model_of(service)})
    if _serves(service, status):
        return _promoted(status)
    if stage.canary is None:
        body = {"predictor": {"model": {"storageUri": model}}}
        return _step(status, "Releasing", f"giving {name} the new model", _patch(service, body))
    if not settings.can_watch:
        return _step(status, "Releasing", "a canary needs controller.prometheusUrl; set it, or remove the canary")
    others = [entry["predictor"].get("name") for entry in service["spec"].get("canary") or []]
    if others and others != [status.candidate]:
        return _step(status, "Releasing", f"waiting for another canary of {name} to end")
    if stage.canary.manual_approval and (run["metadata"].get("annotations") or {}).get(APPROVE) != "true":
        return _step(status, "AwaitingApproval", f'waiting for the annotation {APPROVE}: "true"')
    return _canary(stage.canary, status, service, observed, now)


def _canary(limits: Canary, status: ReleaseStatus, service: Manifest, observed: Observed, now: datetime) -> Release:
    if status.step < 0:
        return _enter(limits, status, service, 0, now)
    percent = limits.steps[status.step]
    current = next(iter(service["spec"].get("canary") or []), None)
    if current is None or current["trafficPercent"] != percent:
        return _hold(status, f"giving {percent}% to {status.candidate}", _canary_patch(service, status, percent))
    if status.ready_time is None:
        if _is_ready(service, status.candidate, percent):
            status = status.model_copy(update={"ready_time": format_time(now)})
            return _hold(status, f"{status.candidate} serves {percent}%")
        if status.step_start_time and now - parse_time(status.step_start_time) > START_LIMIT:
            return _rolled_back(status, service, f"the candidate was not ready within {START_LIMIT}")
        return _hold(status, f"waiting for {status.candidate} to be ready at {percent}%")
    if observed.signals is None:
        return _hold(status, f"{percent}%: live signals are not available; holding")
    signals = observed.signals
    champion = signals.champion if signals.champion.requests > 0 else status.champion
    status = status.model_copy(update={"champion": champion, "observed": signals.candidate})
    against = verdict(signals.candidate, champion, limits)
    if against is not None:
        return _rolled_back(status, service, f"at {percent}%: {against}")
    left = timedelta(minutes=limits.minutes_per_step) - (now - parse_time(status.ready_time or format_time(now)))
    if left > timedelta(0):
        return _hold(status, f"watching {status.candidate} at {percent}%")
    if signals.candidate.feedback < limits.min_feedback:
        missing = limits.min_feedback - signals.candidate.feedback
        return _hold(status, f"{percent}%: waiting for {missing:.0f} more judgements")
    if status.step + 1 < len(limits.steps):
        return _enter(limits, status, service, status.step + 1, now)
    predictor = {"name": status.candidate, "model": {"storageUri": status.model}}
    body = _patch(service, {"predictor": predictor, "canary": None})
    return _hold(status, f"promoting {status.candidate}", body)


def _enter(limits: Canary, status: ReleaseStatus, service: Manifest, step: int, now: datetime) -> Release:
    percent = limits.steps[step]
    status = status.model_copy(
        update={
            "step": step,
            "percent": percent,
            "step_start_time": format_time(now),
            "ready_time": None,
            "observed": None,
        }
    )
    entered = _hold(status, f"giving {percent}% to {status.candidate}", _canary_patch(service, status, percent))
    event = Event("CanaryStep", f"{percent}% of the traffic goes to {status.candidate}", key=str(step))
    return Release(status, entered.phase, entered.message, entered.actions, (event,), None, True)


def _step(status: ReleaseStatus, phase: Phase, message: str, *actions: Action) -> Release:
    return Release(status, phase, message, actions)


def _hold(status: ReleaseStatus, message: str, *actions: Action) -> Release:
    return Release(status, "Releasing", message, actions, holds_canary=True)


def _promoted(status: ReleaseStatus) -> Release:
    status = status.model_copy(update={"decision": "Promoted", "percent": 100, "reason": "all steps passed"})
    event = Event("Promoted", f"{status.model} is the champion")
    return Release(status, "Succeeded", event.message, (SetAlias("champion"),), (event,), "Promoted")


def _rolled_back(status: ReleaseStatus, service: Manifest, reason: str) -> Release:
    status = status.model_copy(update={"decision": "RolledBack", "percent": 0, "reason": reason})
    patch = remove_canary(service, status.candidate)
    event = Event("RolledBack", reason, warning=True)
    return Release(status, "RolledBack", reason, (patch,) if patch else (), (event,), "RolledBack")


def _patch(service: Manifest, spec: Json) -> Patch:
    meta = service["metadata"]
    body = {"metadata": {"resourceVersion": meta["resourceVersion"]}, "spec": spec}
    return Patch("InferenceService", meta["name"], body)


def _canary_patch(service: Manifest, status: ReleaseStatus, percent: int) -> Patch:
    """The candidate runs as the stable predictor does, with its own name and model and a fixed replica count."""
    stable = service["spec"]["predictor"]
    allowed = {key: value for key, value in stable.items() if key not in _NOT_IN_CANARY}
    predictor: Json = copy.deepcopy(allowed)
    predictor["name"] = status.candidate
    predictor["model"]["storageUri"] = status.model
    return _patch(service, {"canary": [{"trafficPercent": percent, "predictor": predictor}]})


_NOT_IN_CANARY = ("name", "maxReplicas", "scaleTarget", "scaleMetric", "scaleMetricType", "autoScaling", "workerSpec")
"""KServe refuses these in a canary: it uses fixed replicas on one node."""


def _model_of(service: Manifest) -> str | None:
    return service["spec"]["predictor"].get("model", {}).get("storageUri")


def _serves(service: Manifest, status: ReleaseStatus) -> bool:
    entries = service["spec"].get("canary") or []
    canaries = [entry["predictor"].get("name") for entry in entries]
    return _model_of(service) == status.model and status.candidate not in canaries


def _is_ready(service: Manifest, candidate: str, percent: int) -> bool:
    statuses = (service.get("status") or {}).get("canaryStatuses") or []
    return any(
        entry.get("name") == candidate and entry.get("ready") and entry.get("trafficPercent") == percent
        for entry in statuses
    )
