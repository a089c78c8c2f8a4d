"""What to do about a run: desired state from observed state. Pure, so that it can be tested by properties.

    plan(run, observed, settings, now) -> new status, actions, events

Every rule looks at the cluster as it is now, never at an event: delivering an event twice, losing one or restarting
the controller in the middle changes nothing. Actions are idempotent, and the status is written only when it changed.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import ValidationError

from services.controller import objects
from services.controller.actions import Action, Create, Delete, DrawToken, Json, Patch
from services.controller.model import CANCEL, RETRY, SPEC_HASH, Event, JobState, Manifest, Observed, Plan, Settings
from services.controller.release import candidate_name, plan_release
from services.controller.status import (
    TERMINAL,
    Phase,
    RunStatus,
    StageStatus,
    format_time,
    parse_time,
    with_condition,
)
from services.controller.trouble import Trouble
from services.controller.turns import blocker, next_turn
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun, ReleaseStage
from steersman.errors import ConfigError

FINALIZER = "steersman.dev/canary"
"""What earlier versions held during a canary. Nothing is held any more, because a finalizer outlives a controller that
goes with its namespace: what a run starts belongs to it, and the canary of a run that is gone is found by its name."""


RETRY_TURN_SECONDS = 5.0
"""A run that waits for its turn looks again after so long."""


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


def _reason_of(job: JobState) -> str:
    """Why a stage's pod ended, one word: what the cluster says of it, the exit code, why the Job gave up."""
    if job.pod_reason is not None and job.exit_code not in objects.final_exit_codes():
        return "OutOfMemory" if job.pod_reason == "OOMKilled" else job.pod_reason
    if job.exit_code is None and job.job_reason:
        return job.job_reason
    return objects.reason_of_exit(job.exit_code)


def _serves_in_cluster(release: ReleaseStage) -> bool:
    return release.inference_service is not None or release.deployment is not None


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
        self._release_finalizer()
        if self.meta.get("deletionTimestamp"):
            self._remove_canary()
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
            self._remove_canary()
            self._leave(manifest)
            self._finish("Cancelled", "Cancelled", f"cancelled by the annotation {CANCEL}")
        elif self._deadline_passed(manifest):
            self._remove_canary()
            self._leave(manifest)
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
            self._set(suspended_seconds=self._suspended_seconds(), suspend_time=None)
        self._known_stages(manifest)
        for body in objects.lasting_objects(self.run, manifest, self.settings):
            if body["kind"] not in self.observed.present:
                self.actions.append(Create(body["kind"], body))
        for index, (name, stage) in enumerate(manifest.stages()):
            if self._stage(name).phase != "Succeeded":
                self._run_stage(manifest, index, name)
            if self._stage(name).phase != "Succeeded":
                return
            served = isinstance(stage, ReleaseStage) and _serves_in_cluster(stage)
            if served and not self._released(manifest, index):
                return
        self._leave(manifest)
        self._finish("Succeeded", "Completed", self._result(manifest))

    def _run_stage(self, manifest: AlignmentRun, index: int, name: str) -> None:
        job = self.observed.jobs.get(name)
        if job is not None and (job.terminating or job.owner != self.meta["uid"]):
            self._wait(name, "WaitingForCleanup", f"waiting until the earlier Job of {name} is gone")
        elif job is not None and job.complete:
            self._stage_done(name, job)
        elif job is not None and job.failed:
            self._stage_failed(manifest, name, job)
        elif not self._may_take_hardware(manifest, index, name):
            self._leave(manifest)
        elif not self._services_ready(manifest, index):
            self._wait_for_services(manifest, name)
        elif job is None:
            for body in objects.stage_objects(self.run, manifest, index, self.settings):
                self.actions.append(Create(body["kind"], body))
            attempt = self._stage(name)
            start = attempt.start_time or format_time(self.now)
            self._set_stage(name, phase="Running", start_time=start, completion_time=None)
            self._wait(name, "StageStarted", f"{name}: Job created")
            self._event("StageStarted", name, key=f"{name}-{self.generation}")
        else:
            self._stage_running(manifest, name, job)

    def _may_take_hardware(self, manifest: AlignmentRun, index: int, name: str) -> bool:
        """Whether the pods of a stage may be made: its queue admitted it, or it is this run's turn."""
        storage = self.settings.storage
        if manifest.spec.trainer.queue is not None:
            if objects.needs(self.run, manifest, index, storage):
                return self._is_admitted(manifest, index, name)
            self._give_workload_back(manifest)  # Kueue admits the Job itself
            return True
        if not objects.takes_several_pods(self.run, manifest, index, storage):
            self._set(turn=None, turn_time=None)
            return True
        old, since = self.status.turn, self.status.turn_time
        troubles = [self.observed.services[service].trouble for service in self.observed.services]
        troubles += [job.trouble for job in self.observed.jobs.values()]
        starved = any(trouble is not None and not trouble.hopeless for trouble in troubles)
        order = (since or format_time(self.now), self.meta["uid"])
        turn = next_turn(old, order, self.observed.peers, starved=starved)
        limit = timedelta(seconds=self.settings.stuck_seconds)
        others_wait = any(peer.turn == "Waiting" for peer in self.observed.peers)
        if turn == old == "Acquiring" and starved and since and others_wait and self.now - parse_time(since) > limit:
            turn = "Waiting"  # it may never fit; others do
        if turn != old:
            self._set(turn=turn, turn_time=format_time(self.now))
            self.requeue = 0.0
        if turn == "Waiting":
            ahead = blocker(order, self.observed.peers)
            self._wait(name, "WaitingForTurn", f"{name}: waiting until {ahead or 'another run'} has its hardware")
            self.requeue = RETRY_TURN_SECONDS
            return False
        if turn == "Acquiring" and old != turn:
            # The others must be able to see it before anything is taken.
            self._wait(name, "TakingHardware", f"{name}: taking its hardware")
            return old == "Holding"
        return True

    def _is_admitted(self, manifest: AlignmentRun, index: int, name: str) -> bool:
        """One Workload of Kueue stands for services and Job together: all of them, or none."""
        queue = manifest.spec.trainer.queue
        workload = self.observed.workload
        if workload is not None and (workload.stage != name or workload.evicted):
            if any(self._alive(job) for job in self.observed.jobs.values()) or self._service_runs():
                self._wait(name, "LeavingHardware", f"{name}: giving the hardware back to the queue {queue}")
                return False
            self._give_workload_back(manifest)
            self._wait(name, "WaitingInQueue", f"{name}: waiting in the queue {queue}")
            return False
        if workload is None:
            self.actions.append(Create("Workload", objects.workload(self.run, manifest, index, self.settings)))
        if workload is None or not workload.admitted:
            said = f" ({workload.message})" if workload is not None and workload.message else ""
            self._wait(name, "WaitingInQueue", f"{name}: waiting in the queue {queue}{said}")
            return False
        return True

    def _give_workload_back(self, manifest: AlignmentRun) -> None:
        if self.observed.workload is not None and not self._service_runs():
            self.actions.append(Delete("Workload", objects.object_name(manifest.metadata.name, "workload")))

    def _service_runs(self) -> bool:
        return any(state.replicas for state in self.observed.services.values())

    def _wait_for_services(self, manifest: AlignmentRun, name: str) -> None:
        for service, state in self.observed.services.items():
            if state.replicas and state.trouble is not None:
                self._held_up(manifest, name, service, state.trouble)
                return
        self._wait(name, "StartingServices", f"{name}: waiting for the services to load their models")

    def _held_up(self, manifest: AlignmentRun, name: str, part: str | None, trouble: Trouble) -> None:
        """Says what holds a stage up; what does not mend itself ends it after a while."""
        message = ": ".join(word for word in (name, part, str(trouble)) if word)
        self._stage_is(name, message)
        self._condition("Progressing", False, trouble.reason, message)
        self._event(trouble.reason, message, warning=True, key=f"{name}-{part}-{trouble.reason}-{self.generation}")
        if not trouble.hopeless:
            self._set(blocked_since=None)
            return
        since = self.status.blocked_since or format_time(self.now)
        self._set(blocked_since=since)
        left = parse_time(since) + timedelta(seconds=self.settings.stuck_seconds) - self.now
        if left <= timedelta(0):
            self._end_stage(manifest, name, trouble.reason, f"{message}; this does not mend itself", None)
        else:
            self.requeue = left.total_seconds()

    def _stage_running(self, manifest: AlignmentRun, name: str, job: JobState) -> None:
        start = self._stage(name).start_time or format_time(self.now)
        self._set_stage(name, phase="Running", start_time=start, attempts=job.failed_pods)
        if job.failed_pods:
            reason = _reason_of(job)
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
        if job.running >= job.wanted and self.status.turn == "Acquiring":
            self._set(turn="Holding", turn_time=format_time(self.now))
        if job.trouble is not None and job.running < job.wanted:
            self._held_up(manifest, name, None, job.trouble)
            return
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
        self._set(turn=None, turn_time=None, blocked_since=None)
        self._event("StageSucceeded", name, key=name)

    def _stage_failed(self, manifest: AlignmentRun, name: str, job: JobState) -> None:
        reason = _reason_of(job)
        message = _last_words(job.log, name) or f"{name} failed ({reason})"
        self._end_stage(manifest, name, reason, message, job)

    def _end_stage(self, manifest: AlignmentRun, name: str, reason: str, message: str, job: JobState | None) -> None:
        seen = {} if job is None else {"attempts": job.failed_pods, "exit_code": job.exit_code, "log": job.log}
        ended = format_time(self.now)
        self._set_stage(name, phase="Failed", completion_time=ended, reason=reason, message=message, **seen)
        self._set(stage=name)
        self._leave(manifest)
        self._finish("Failed", reason, message)

    def _services_ready(self, manifest: AlignmentRun, index: int) -> bool:
        """Brings the services of a stage to the state it needs, and those that it does not need to nothing.

        Pods keep the shape that they were given when the stage began: an upgrade of the chart restarts nothing that a
        stage works with, and reaches the services with the next stage.
        """
        stage = manifest.stage_names()[index]
        needed = objects.needs(self.run, manifest, index, self.settings.storage)
        self._scale_down(manifest, tuple(name for name in objects.PORTS if name not in needed))
        ready = True
        for service, config in needed.items():
            state = self.observed.services.get(service)
            if state is not None and state.replicas and state.stage == stage:
                ready = ready and state.ready
                continue
            bodies = objects.service_objects(self.run, manifest, service, config, self.settings, stage)
            wanted = bodies[-1]
            annotations = wanted["metadata"]["annotations"]
            if state is None or state.spec_hash != annotations[SPEC_HASH]:
                self.actions.append(DrawToken(objects.token_secret(self.run, manifest)))  # once: an existing one stays
            if state is None:
                self.actions.extend(Create(body["kind"], body) for body in bodies)
                ready = False
                continue
            body = {"metadata": {"annotations": annotations}}
            same = state.replicas and state.spec_hash == annotations[SPEC_HASH]
            if not same:
                body["spec"] = {"replicas": wanted["spec"]["replicas"], "template": wanted["spec"]["template"]}
            self.actions.append(Patch("StatefulSet", wanted["metadata"]["name"], body))
            ready = bool(ready and same and state.ready)
        return ready

    def _released(self, manifest: AlignmentRun, index: int) -> bool:
        """Walks the canary; True once the candidate serves."""
        stage = manifest.spec.stages[index].spec
        assert isinstance(stage, ReleaseStage)
        if self.status.release is not None and self.status.release.decision == "Promoted":
            return True
        self._leave(manifest)
        where = objects.model_path if stage.deployment is not None else objects.model_uri
        model = where(self.run, manifest.stage_names()[index], self.settings.storage)
        step = plan_release(self.run, stage, model, self.status.release, self.observed, self.settings, self.now)
        self._set(release=step.status, phase=step.phase, message=step.message, stage=manifest.stage_names()[index])
        self.actions.extend(step.actions)
        self.events.extend(step.events)
        if step.outcome is None:
            self._condition("Released", False, "InProgress", step.message)
            return False
        self._condition("Released", step.outcome == "Promoted", step.outcome, step.message)
        if step.outcome == "RolledBack":
            self._finish("RolledBack", "RolledBack", step.message)
        return step.outcome == "Promoted"

    def _suspend(self, manifest: AlignmentRun) -> None:
        """Frees the hardware; what is written stays, and the stage goes on from its checkpoint."""
        if self.status.phase != "Suspended":
            self._event("Suspended", "the run is held", key=self.generation)
            self._set(suspend_time=format_time(self.now))
        if self._leave(manifest):
            message = "suspended; set spec.suspend to false to go on"
        else:
            message = "suspending: the stage saves and leaves, then its services"
        self._set(phase="Suspended", message=message, turn=None, turn_time=None, blocked_since=None)
        self._condition("Progressing", False, "Suspended", "spec.suspend is true")

    def _retry(self, manifest: AlignmentRun) -> bool:
        """Obeys a new value of the retry annotation: the failed stage runs again."""
        token = self.annotations.get(RETRY)
        if self.old.phase != "Failed" or token is None or token == self.old.retry:
            return False
        self._set(retry=token, phase="Running", message="running the failed stage again", completion_time=None)
        self._set(blocked_since=None)
        for name in manifest.stage_names():
            job = self.observed.jobs.get(name)
            if job is not None and job.failed and job.owner == self.meta["uid"]:
                self.actions.append(Delete("Job", objects.object_name(manifest.metadata.name, name)))
            if any(stage.name == name and stage.phase == "Failed" for stage in self.old.stages):
                self._set_stage(name, phase="Pending", completion_time=None)
        self._condition("Complete", False, "Retried", "the failed stage runs again")
        self._event("Retried", f"asked for by the annotation {RETRY}", key=token)
        self.requeue = 1.0
        return True

    def _after_the_end(self, manifest: AlignmentRun) -> None:
        left_all = self._leave(manifest)
        ttl = manifest.spec.ttl_seconds_after_finished
        if ttl is None or self.old.completion_time is None or not left_all:
            return
        left = parse_time(self.old.completion_time) + timedelta(seconds=ttl) - self.now
        if left > timedelta(0):
            self.requeue = left.total_seconds()
        elif self._folder_is_tidy(manifest):
            self.actions.append(Delete("AlignmentRun", self.meta["name"]))

    def _folder_is_tidy(self, manifest: AlignmentRun) -> bool:
        """Removes what the manifest does not keep of the run's folder, by a Job; True when nothing is left to do."""
        if manifest.spec.ttl_keeps == "all":
            return True
        job = self.observed.jobs.get(objects.TIDY)
        if job is None:
            self.actions.append(Create("Job", objects.tidy_job(self.run, manifest, self.settings)))
        elif job.failed:
            self._set(message=f"the folder could not be tidied: {job.log or job.job_reason}; remove it by hand")
            return True
        return job is not None and job.complete

    def _leave(self, manifest: AlignmentRun) -> bool:
        """Ends what runs for this run, the trainer first: it saves while its services still answer.

        Returns:
            Whether everything has gone.
        """
        alive = False
        for name, job in self.observed.jobs.items():
            if job.owner != self.meta["uid"] or not self._alive(job) or name == objects.TIDY:
                continue
            alive = True
            if not job.terminating:
                self.actions.append(Delete("Job", objects.object_name(manifest.metadata.name, name)))
                self._set_stage(name, phase="Pending")
        if alive:
            return False
        self._scale_down(manifest, tuple(objects.PORTS))
        if self.status.phase != "Running":
            self._give_workload_back(manifest)
        return not self._service_runs()

    @staticmethod
    def _alive(job: JobState) -> bool:
        return job.terminating or not (job.complete or job.failed)

    def _remove_canary(self) -> None:
        if self.observed.endpoint is not None:
            self.actions.extend(self.observed.endpoint.take_back(candidate_name(self.run)))

    def _scale_down(self, manifest: AlignmentRun, services: tuple[str, ...]) -> None:
        for service in services:
            state = self.observed.services.get(service)
            if state is not None and state.replicas:
                name = objects.object_name(manifest.metadata.name, service)
                self.actions.append(Patch("StatefulSet", name, {"spec": {"replicas": 0}}))

    def _release_finalizer(self) -> None:
        held = self.meta.get("finalizers") or []
        if FINALIZER in held:
            rest = [item for item in held if item != FINALIZER]
            body = {"metadata": {"finalizers": rest, "resourceVersion": self.meta["resourceVersion"]}}
            self.actions.append(Patch("AlignmentRun", self.meta["name"], body))

    def _deadline_passed(self, manifest: AlignmentRun) -> bool:
        """The time during which the run was held does not count."""
        limit = manifest.spec.active_deadline_seconds
        if limit is None or self.old.start_time is None:
            return False
        active = self.now - parse_time(self.old.start_time) - timedelta(seconds=self._suspended_seconds())
        return active > timedelta(seconds=limit)

    def _suspended_seconds(self) -> int:
        held = self.old.suspended_seconds
        if self.old.suspend_time is not None:
            held += int((self.now - parse_time(self.old.suspend_time)).total_seconds())
        return held

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
        """Nothing is wrong: it takes its time."""
        self._stage_is(stage, message)
        self._set(blocked_since=None)
        self._condition("Progressing", True, reason, message)

    def _stage_is(self, stage: str, message: str) -> None:
        if self.status.stage != stage:  # the figures of the stage before are not this one's
            self._set(step=None, total_steps=None, tokens_per_second=None)
        self._set(phase="Running", stage=stage, message=message)

    def _finish(self, phase: Phase, reason: str, message: str) -> None:
        self._set(phase=phase, message=message, turn=None, turn_time=None)
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
