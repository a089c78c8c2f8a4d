"""What to do about a run: desired state from observed state. Pure, so that it can be tested by properties.

    plan(run, observed, settings, now) -> new status, actions, events

Every rule looks at the cluster as it is now, never at an event: delivering an event twice, losing one or restarting
the controller in the middle changes nothing. Actions are idempotent, and the status is written only when it changed.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import ValidationError

from services.controller import objects
from services.controller.model import (
    CANCEL,
    RETRY,
    SPEC_HASH,
    Action,
    Create,
    Delete,
    DrawToken,
    Event,
    JobState,
    Json,
    Manifest,
    Observed,
    Patch,
    Plan,
    Settings,
)
from services.controller.release import candidate_name, plan_release, remove_canary
from services.controller.status import (
    TERMINAL,
    Phase,
    RunStatus,
    StageStatus,
    format_time,
    parse_time,
    with_condition,
)
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun, ReleaseStage
from steersman.errors import ConfigError

FINALIZER = "steersman.dev/canary"
"""Held only while an InferenceService carries this run's canary."""


def parse_run(run: Manifest) -> AlignmentRun:
    """The manifest of an AlignmentRun object; ConfigError names every wrong field."""
    meta = run["metadata"]
    document = {
        "apiVersion": run["apiVersion"],
        "kind": run["kind"],
        "metadata": {"name": meta["name"], "namespace": meta["namespace"]},
        "spec": run["spec"],
    }
    return load_model(AlignmentRun, document, f"{meta['namespace']}/{meta['name']}")


def read_status(run: Manifest) -> RunStatus:
    """The stored status; an unreadable one (older controller, edited by hand) counts as empty."""
    try:
        return RunStatus.model_validate(run.get("status") or {}, by_alias=True, by_name=False)
    except ValidationError:
        return RunStatus()


def plan(run: Manifest, observed: Observed, settings: Settings, now: datetime) -> Plan:
    """Decides about one run.

    Args:
        run: the AlignmentRun as stored, with its status.
        observed: everything in the cluster that belongs to it.
        settings: pod templates and storage of this cluster.
        now: the time of the decision.
    """
    return _Planner(run, observed, settings, now).decide()


def _last_words(log: str | None, stage: str) -> str | None:
    """What a failed stage said itself (`<stage>: why`); otherwise the last line of its log."""
    lines = [line.strip() for line in (log or "").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(f"{stage}: ")]
    if said:
        return said[-1]
    return f"{stage}: {lines[-1]}" if lines else None


class _Planner:
    """One decision: the status is built up field by field while the rules are walked in order."""

    def __init__(self, run: Manifest, observed: Observed, settings: Settings, now: datetime) -> None:
        self.run = run
        self.meta = run["metadata"]
        self.generation = str(self.meta.get("generation", 0))
        self.annotations: Json = self.meta.get("annotations") or {}
        self.observed = observed
        self.settings = settings
        self.now = now
        self.old = read_status(run)
        self.status = self.old
        self.actions: list[Action] = []
        self.events: list[Event] = []
        self.requeue: float | None = None

    def decide(self) -> Plan:
        if self.meta.get("deletionTimestamp"):
            self._let_go()
            return self._plan()
        self._set(observed_generation=self.meta.get("generation", 0))
        try:
            manifest = parse_run(self.run)
        except ConfigError as error:
            if self.old.phase not in TERMINAL:
                self._condition("Valid", False, "InvalidManifest", str(error))
                self._finish("Failed", "InvalidManifest", str(error))
            return self._plan()
        self._condition("Valid", True, "Valid", "the manifest is complete and consistent")
        if self.old.phase in TERMINAL:
            if not self._retry(manifest):
                self._after_the_end(manifest)
        elif self.annotations.get(CANCEL) == "true":
            self._stop(manifest)
            self._finish("Cancelled", "Cancelled", f"cancelled by the annotation {CANCEL}")
        elif self._deadline_passed(manifest):
            self._stop(manifest)
            limit = manifest.spec.active_deadline_seconds
            self._finish("Failed", "DeadlineExceeded", f"the run took longer than {limit} seconds")
        elif manifest.spec.suspend:
            self._suspend(manifest)
        else:
            self._advance(manifest)
        return self._plan()

    # Rules

    def _advance(self, manifest: AlignmentRun) -> None:
        """Runs the first stage that is not done."""
        if self.old.start_time is None:
            self._set(start_time=format_time(self.now))
            self._event("Started", f"{len(manifest.spec.stages)} stages")
        if self.status.phase == "Suspended":
            self._event("Resumed", "the run goes on", key=self.generation)
        self._known_stages(manifest)
        if not self.observed.has_manifest:
            self.actions.append(Create("ConfigMap", objects.manifest_map(self.run, manifest, self.settings)))
        for index, name in enumerate(manifest.stage_names()):
            if self._stage(name).phase != "Succeeded":
                self._run_stage(manifest, index, name)
            if self._stage(name).phase != "Succeeded":
                return
            release = manifest.spec.stages[index].release
            if release is not None and release.inference_service is not None and not self._released(manifest, index):
                return
        self._stop(manifest)
        self._finish("Succeeded", "Completed", self._result(manifest))

    def _run_stage(self, manifest: AlignmentRun, index: int, name: str) -> None:
        job = self.observed.jobs.get(name)
        if job is not None and (job.terminating or job.owner != self.meta["uid"]):
            self._wait(name, "WaitingForCleanup", f"waiting until the earlier Job of {name} is gone")
        elif job is not None and job.complete:
            self._stage_done(name, job)
        elif job is not None and job.failed:
            self._stage_failed(manifest, name, job)
        elif not self._services_ready(manifest, index):
            self._wait(name, "StartingServices", f"{name}: waiting for the services to load their models")
        elif job is None:
            for body in objects.stage_objects(self.run, manifest, index, self.settings):
                self.actions.append(Create(body["kind"], body))
            attempt = self._stage(name)
            start = attempt.start_time or format_time(self.now)
            self._set_stage(name, phase="Running", start_time=start, completion_time=None)
            self._set(step=None, total_steps=None, tokens_per_second=None)
            self._wait(name, "StageStarted", f"{name}: Job created")
            self._event("StageStarted", name, key=f"{name}-{self.generation}")
        else:
            self._stage_running(name, job)

    def _stage_running(self, name: str, job: JobState) -> None:
        start = self._stage(name).start_time or format_time(self.now)
        self._set_stage(name, phase="Running", start_time=start, attempts=job.failed_pods)
        if job.failed_pods:
            reason = objects.reason_of_exit(job.exit_code)
            self._set_stage(name, exit_code=job.exit_code, reason=reason, log=job.log)
            self._event(
                "StageRetried", f"{name}: {reason}, attempt {job.failed_pods + 1}", key=f"{name}-{job.failed_pods}"
            )
        said = job.progress
        seen = {
            "step": said.step,
            "total_steps": said.total,
            "reward": said.reward,
            "kl": said.kl,
            "tokens_per_second": said.tokens_per_second,
        }
        self._set(**{key: value for key, value in seen.items() if value is not None})
        text = f"step {said.step} of {said.total}" if said.step is not None else (job.waiting or "starting")
        self._wait(name, "StageRunning", f"{name}: {text}")

    def _stage_done(self, name: str, job: JobState) -> None:
        self._set_stage(
            name,
            phase="Succeeded",
            attempts=job.failed_pods,
            completion_time=format_time(self.now),
            exit_code=None,
            reason=None,
            message=None,
            log=None,
        )
        self._event("StageSucceeded", name, key=name)

    def _stage_failed(self, manifest: AlignmentRun, name: str, job: JobState) -> None:
        reason = objects.reason_of_exit(job.exit_code)
        if job.exit_code is None and job.job_reason:
            reason = job.job_reason
        message = _last_words(job.log, name) or f"{name} failed ({reason})"
        self._set_stage(
            name,
            phase="Failed",
            attempts=job.failed_pods,
            completion_time=format_time(self.now),
            exit_code=job.exit_code,
            reason=reason,
            message=message,
            log=job.log,
        )
        self._set(stage=name)
        self._stop(manifest, keep_jobs=True)
        self._finish("Failed", reason, message)

    def _services_ready(self, manifest: AlignmentRun, index: int) -> bool:
        """Brings the services of a stage to the state it needs, and those that it does not need to nothing."""
        needed = objects.needs(self.run, manifest, index, self.settings.storage)
        self._scale_down(manifest, tuple(name for name in objects.PORTS if name not in needed))
        ready = True
        for service, config in needed.items():
            bodies = objects.service_objects(self.run, manifest, service, config, self.settings)
            wanted = bodies[-1]
            state = self.observed.services.get(service)
            if state is None or state.spec_hash != wanted["metadata"]["annotations"][SPEC_HASH]:
                self.actions.append(DrawToken(objects.token_secret(self.run, manifest)))  # once: an existing one stays
            if state is None:
                self.actions.extend(Create(body["kind"], body) for body in bodies)
                ready = False
            elif state.spec_hash != wanted["metadata"]["annotations"][SPEC_HASH] or state.replicas == 0:
                body = {
                    "metadata": {"annotations": wanted["metadata"]["annotations"]},
                    "spec": {"replicas": wanted["spec"]["replicas"], "template": wanted["spec"]["template"]},
                }
                self.actions.append(Patch("StatefulSet", wanted["metadata"]["name"], body))
                ready = False
            else:
                ready = ready and state.ready
        return ready

    def _released(self, manifest: AlignmentRun, index: int) -> bool:
        """Walks the canary; True once the candidate serves."""
        stage = manifest.spec.stages[index].spec
        assert isinstance(stage, ReleaseStage)
        if self.status.release is not None and self.status.release.decision == "Promoted":
            return True
        self._scale_down(manifest, tuple(objects.PORTS))
        uri = objects.model_uri(self.run, manifest.stage_names()[index], self.settings.storage)
        step = plan_release(self.run, stage, uri, self.status.release, self.observed, self.settings, self.now)
        self._set(release=step.status, phase=step.phase, message=step.message, stage=manifest.stage_names()[index])
        if step.holds_canary:
            self._hold_finalizer(True)
        self.actions.extend(step.actions)
        self.events.extend(step.events)
        if step.outcome is None:
            self._condition("Released", False, "InProgress", step.message)
            return False
        self._hold_finalizer(False)
        self._condition("Released", step.outcome == "Promoted", step.outcome, step.message)
        if step.outcome == "RolledBack":
            self._finish("RolledBack", "RolledBack", step.message)
        return step.outcome == "Promoted"

    def _suspend(self, manifest: AlignmentRun) -> None:
        """Frees the hardware; what is written stays, and the stage goes on from its checkpoint."""
        if self.status.phase != "Suspended":
            self._event("Suspended", "the run is held", key=self.generation)
        self._stop(manifest, keep_canary=True)
        self._set(phase="Suspended", message="suspended; set spec.suspend to false to go on")
        self._condition("Progressing", False, "Suspended", "spec.suspend is true")

    def _retry(self, manifest: AlignmentRun) -> bool:
        """Obeys a new value of the retry annotation: the failed stage runs again."""
        token = self.annotations.get(RETRY)
        if self.old.phase != "Failed" or token is None or token == self.old.retry:
            return False
        self._set(retry=token, phase="Running", message="running the failed stage again", completion_time=None)
        for name in manifest.stage_names():
            job = self.observed.jobs.get(name)
            if job is not None and job.failed:
                self.actions.append(Delete("Job", objects.object_name(manifest.metadata.name, name)))
            if any(stage.name == name and stage.phase == "Failed" for stage in self.old.stages):
                self._set_stage(name, phase="Pending", completion_time=None)
        self._condition("Complete", False, "Retried", "the failed stage runs again")
        self._event("Retried", f"asked for by the annotation {RETRY}", key=token)
        self.requeue = 1.0
        return True

    def _after_the_end(self, manifest: AlignmentRun) -> None:
        self._scale_down(manifest, tuple(objects.PORTS))
        self._hold_finalizer(False)
        ttl = manifest.spec.ttl_seconds_after_finished
        if ttl is None or self.old.completion_time is None:
            return
        left = parse_time(self.old.completion_time) + timedelta(seconds=ttl) - self.now
        if left <= timedelta(0):
            self.actions.append(Delete("AlignmentRun", self.meta["name"]))
        else:
            self.requeue = left.total_seconds()

    def _let_go(self) -> None:
        """The run is being deleted: everything owned goes by itself; only the canary must be taken back."""
        if FINALIZER in self.meta.get("finalizers", []):
            self._remove_canary()
            self._hold_finalizer(False)

    def _stop(self, manifest: AlignmentRun, *, keep_jobs: bool = False, keep_canary: bool = False) -> None:
        """Ends what runs for this run."""
        self._scale_down(manifest, tuple(objects.PORTS))
        if not keep_canary:
            self._remove_canary()
            self._hold_finalizer(False)
        if keep_jobs:
            return
        for name, job in self.observed.jobs.items():
            if not (job.complete or job.failed or job.terminating) and job.owner == self.meta["uid"]:
                self.actions.append(Delete("Job", objects.object_name(manifest.metadata.name, name)))
                self._set_stage(name, phase="Pending")

    def _remove_canary(self) -> None:
        service = self.observed.inference_service
        patch = remove_canary(service, candidate_name(self.run)) if service is not None else None
        if patch is not None:
            self.actions.append(patch)

    def _scale_down(self, manifest: AlignmentRun, services: tuple[str, ...]) -> None:
        for service in services:
            state = self.observed.services.get(service)
            if state is not None and state.replicas:
                name = objects.object_name(manifest.metadata.name, service)
                self.actions.append(Patch("StatefulSet", name, {"spec": {"replicas": 0}}))

    def _hold_finalizer(self, hold: bool) -> None:
        """Adds the finalizer before the canary begins, and removes it after the canary has ended."""
        held = self.meta.get("finalizers") or []
        wanted = [*(item for item in held if item != FINALIZER), *([FINALIZER] if hold else [])]
        if (FINALIZER in held) != hold:
            body = {"metadata": {"finalizers": wanted, "resourceVersion": self.meta["resourceVersion"]}}
            patch = Patch("AlignmentRun", self.meta["name"], body)
            self.actions.insert(0, patch) if hold else self.actions.append(patch)

    def _deadline_passed(self, manifest: AlignmentRun) -> bool:
        limit = manifest.spec.active_deadline_seconds
        if limit is None or self.old.start_time is None:
            return False
        return self.now - parse_time(self.old.start_time) > timedelta(seconds=limit)

    # The status

    def _set(self, **fields: object) -> None:
        self.status = self.status.model_copy(update=fields)

    def _stage(self, name: str) -> StageStatus:
        return next((stage for stage in self.status.stages if stage.name == name), StageStatus(name=name))

    def _set_stage(self, name: str, **fields: object) -> None:
        changed = self._stage(name).model_copy(update=fields)
        self._set(stages=[changed if stage.name == name else stage for stage in self.status.stages])

    def _known_stages(self, manifest: AlignmentRun) -> None:
        self._set(stages=[self._stage(name) for name in manifest.stage_names()])

    def _condition(self, kind: str, holds: bool, reason: str, message: str) -> None:
        generation = self.meta.get("generation", 0)
        conditions = with_condition(self.status.conditions, kind, holds, reason, message, generation, self.now)
        self._set(conditions=conditions)

    def _wait(self, stage: str, reason: str, message: str) -> None:
        self._set(phase="Running", stage=stage, message=message)
        self._condition("Progressing", True, reason, message)

    def _finish(self, phase: Phase, reason: str, message: str) -> None:
        self._set(phase=phase, message=message)
        if self.status.completion_time is None:
            self._set(completion_time=format_time(self.now))
        self._condition("Progressing", False, reason, message)
        self._condition("Complete", phase == "Succeeded", reason, message)
        self._event(phase, message, warning=phase != "Succeeded")

    def _result(self, manifest: AlignmentRun) -> str:
        if self.status.release is not None:
            return f"{self.status.release.model} is released"
        return f"{len(manifest.spec.stages)} stages are done"

    def _event(self, reason: str, message: str, *, warning: bool = False, key: str = "") -> None:
        self.events.append(Event(reason, message, warning, key))

    def _plan(self) -> Plan:
        return Plan(self.status.to_dict(), tuple(self.actions), tuple(self.events), self.requeue)
