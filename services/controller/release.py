"""The release: approval, canary steps, watching, promotion or rollback. Pure.

    waiting -> approved -> 10 % -> 50 % -> 100 % -> Promoted
                             \\-- errors, latency, thumbs down --> RolledBack

What serves (KServe, or Deployments behind our gateway) is an `Endpoint`; what the signals allow to say is decided by
`steersman/canary.py`. Missing signals never promote, and neither do too few judgements: both hold.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from services.controller.actions import Action, SetAlias
from services.controller.endpoint import Endpoint
from services.controller.model import APPROVE, Event, Manifest, Observed, Settings
from services.controller.status import Phase, ReleaseStatus, format_time, parse_time
from steersman.canary import decide, weigh
from steersman.config.manifest import Canary, ReleaseStage

START_LIMIT = timedelta(minutes=30)
"""A candidate that is not ready by then is taken back."""


@dataclass(frozen=True)
class Release:
    """State of the release after one look at it."""

    status: ReleaseStatus
    phase: Phase
    message: str
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    outcome: Literal["Promoted", "RolledBack"] | None = None


def candidate_name(run: Manifest) -> str:
    """Name of the candidate; different for every run, also for two of the same name."""
    return "c" + hashlib.sha256(run["metadata"]["uid"].encode()).hexdigest()[:8]


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
        stage: its release stage, with an InferenceService or a Deployment.
        model: where the endpoint finds the released model.
        status: what the last look left; None at the first.
        observed: the cluster.
        settings: what the controller can do.
        now: time of this look.
    """
    endpoint = observed.endpoint
    if status is None:
        status = ReleaseStatus(candidate=candidate_name(run), model=model)
        if endpoint is None:
            return _step(status, "registered the candidate", SetAlias("candidate"))
        status = status.model_copy(update={"previous_model": endpoint.model})
        event = Event("CandidateRegistered", f"{model} is the candidate for {endpoint.title}")
        return Release(status, "Releasing", "registered the candidate", (SetAlias("candidate"),), (event,))
    if endpoint is None:
        kind, name = target(stage)
        return _step(status, f"waiting for the {kind} {name}, which does not exist")
    if status.previous_model is None and endpoint.model != status.model:
        status = status.model_copy(update={"previous_model": endpoint.model})
    if endpoint.serves(status):
        return _promoted(status)
    if status.promoting:
        return _step(status, f"promoting {status.candidate}", *endpoint.promote(status))
    if stage.canary is None:
        return _step(status, f"giving {target(stage)[1]} the new model", *endpoint.publish(model))
    if not settings.can_watch:
        return _step(status, "a canary needs controller.prometheusUrl; set it, or remove the canary")
    if endpoint.canaries and endpoint.canaries != (status.candidate,):
        return _step(status, f"waiting for another canary of {target(stage)[1]} to end")
    if stage.canary.manual_approval and (run["metadata"].get("annotations") or {}).get(APPROVE) != "true":
        return Release(status, "AwaitingApproval", f'waiting for the annotation {APPROVE}: "true"')
    return _canary(stage.canary, status, endpoint, observed, now)


def target(stage: ReleaseStage) -> tuple[str, str]:
    """Kind and name of what serves the bot."""
    if stage.deployment is not None:
        return "Deployment", stage.deployment
    return "InferenceService", stage.inference_service or ""


def _canary(limits: Canary, status: ReleaseStatus, endpoint: Endpoint, observed: Observed, now: datetime) -> Release:
    if status.step < 0:
        return _enter(limits, status, endpoint, 0, now)
    percent = limits.steps[status.step]
    if endpoint.share(status.candidate) != percent:
        return _step(status, f"giving {percent}% to {status.candidate}", *endpoint.give(status, percent))
    if status.ready_time is None or status.counted_since is None:
        return _wait_until_ready(status, endpoint, percent, now)
    if observed.signals is None:
        return _step(status, f"{percent}%: live signals are not available; holding")
    evidence = weigh(status.evidence, observed.signals.champion, observed.signals.candidate, limits)
    status = status.model_copy(update={"evidence": evidence})
    verdict = decide(evidence, limits)
    if verdict.against is not None:
        return _rolled_back(status, endpoint, f"at {percent}%: {verdict.against}")
    if now < parse_time(status.ready_time or format_time(now)) + timedelta(minutes=limits.minutes_per_step):
        return _step(status, f"watching {status.candidate} at {percent}%")
    if evidence.candidate.judged < limits.min_feedback:
        missing = limits.min_feedback - evidence.candidate.judged
        return _step(status, f"{percent}%: waiting for {missing:.0f} more judgements")
    following = limits.steps[status.step + 1] if status.step + 1 < len(limits.steps) else None
    if not verdict.harmless and (following is None or following == 100):
        # With all traffic on the candidate there is nothing left to compare it with.
        judged = evidence.candidate.judged + evidence.champion.judged
        doubt = f"to exclude {limits.max_thumbs_down_increase:.1%} more thumbs down"
        return _step(status, f"{percent}%: not enough people judged ({judged:.0f}) {doubt}")
    if following is not None:
        return _enter(limits, status, endpoint, status.step + 1, now)
    status = status.model_copy(update={"promoting": True})
    return _step(status, f"promoting {status.candidate}", *endpoint.promote(status))


def _wait_until_ready(status: ReleaseStatus, endpoint: Endpoint, percent: int, now: datetime) -> Release:
    if endpoint.is_ready(status.candidate, percent):
        ready = format_time(now)
        status = status.model_copy(update={"ready_time": ready, "counted_since": status.counted_since or ready})
        return _step(status, f"{status.candidate} serves {percent}%")
    if status.step_start_time and now - parse_time(status.step_start_time) > START_LIMIT:
        return _rolled_back(status, endpoint, f"the candidate was not ready within {START_LIMIT}")
    return _step(status, f"waiting for {status.candidate} to be ready at {percent}%")


def _enter(limits: Canary, status: ReleaseStatus, endpoint: Endpoint, step: int, now: datetime) -> Release:
    percent = limits.steps[step]
    began = {"step": step, "percent": percent, "step_start_time": format_time(now), "ready_time": None}
    status = status.model_copy(update=began)
    event = Event("CanaryStep", f"{percent}% of the traffic goes to {status.candidate}", key=str(step))
    message = f"giving {percent}% to {status.candidate}"
    return Release(status, "Releasing", message, endpoint.give(status, percent), (event,))


def _step(status: ReleaseStatus, message: str, *actions: Action) -> Release:
    return Release(status, "Releasing", message, actions)


def _promoted(status: ReleaseStatus) -> Release:
    done = {"decision": "Promoted", "percent": 100, "promoting": False, "reason": "all steps passed"}
    status = status.model_copy(update=done)
    event = Event("Promoted", f"{status.model} is the champion")
    return Release(status, "Succeeded", event.message, (SetAlias("champion"),), (event,), "Promoted")


def _rolled_back(status: ReleaseStatus, endpoint: Endpoint, reason: str) -> Release:
    status = status.model_copy(update={"decision": "RolledBack", "percent": 0, "reason": reason})
    event = Event("RolledBack", reason, warning=True)
    return Release(status, "RolledBack", reason, endpoint.take_back(status.candidate), (event,), "RolledBack")
