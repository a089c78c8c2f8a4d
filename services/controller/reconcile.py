"""Observe, plan, act, write the status: one look at one run."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus

from kubernetes.aio.client.exceptions import ApiException

from services.controller.actions import Action, Apply, Create, Delete, DrawToken, Json, Patch, SetAlias
from services.controller.kserve import KServeEndpoint
from services.controller.kube import Kube, explain
from services.controller.model import CANARY_OF, Event, Manifest, Settings
from services.controller.observe import as_written, is_owned, observe
from services.controller.plan import plan, read_status
from services.controller.signals import LiveSignals
from services.controller.status import format_time, with_condition
from steersman.errors import ConflictError, SteersmanError
from steersman.registry import Registry

log = logging.getLogger("steersman.controller")

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 300.0


def utc_now() -> datetime:
    return datetime.now(UTC)


class Backoff:
    """Pauses that double while a run's looks fail, and begin anew with one that does not."""

    def __init__(self) -> None:
        self._failures: dict[tuple[str, str], int] = {}

    def failed(self, key: tuple[str, str]) -> float:
        """Seconds to wait now."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        return min(FIRST_RETRY_SECONDS * 2.0**count, LONGEST_RETRY_SECONDS)

    def succeeded(self, key: tuple[str, str]) -> None:
        self._failures.pop(key, None)


class Reconciler:
    """Brings runs to their desired state. One look at a run at a time (the caller sees to it), several runs at once."""

    def __init__(
        self,
        kube: Kube,
        settings: Settings,
        *,
        signals: LiveSignals | None = None,
        registry: Registry | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.backoff = Backoff()
        self._kube = kube
        self._settings = settings
        self._signals = signals
        self._registry = registry
        self._clock = clock

    async def reconcile(self, namespace: str, name: str) -> float | None:
        """Looks at one run.

        Returns:
            Seconds after which it should be looked at again without an event; None: only after one.
        """
        key = (namespace, name)
        stored = await self._kube.get("AlignmentRun", namespace, name)
        if stored is None:
            await self._take_back_canaries(namespace, name)
            self.backoff.succeeded(key)
            return None
        run = as_written(stored)
        now = self._clock()
        decision = plan(run, await observe(self._kube, run, self._signals, self._settings, now), self._settings, now)
        try:
            for action in decision.actions:
                await self._act(run, decision.status, action)
        except ApiException as error:
            if error.status in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND):
                return 0.0  # someone else wrote first: look again, decide anew
            await self._explain(run, f"the API server refuses a change ({explain(error)})")
            return self.backoff.failed(key)
        except SteersmanError as error:
            await self._explain(run, str(error))
            return self.backoff.failed(key)
        if not await self._write(run, decision.status):
            return 0.0
        for event in decision.events:
            await self._tell(run, event)
        self.backoff.succeeded(key)
        return decision.requeue_seconds

    async def _take_back_canaries(self, namespace: str, name: str) -> None:
        """Of a run that is gone; what else it had belonged to it and went with it."""
        for service in await self._kube.list("InferenceService", namespace):
            if canary_of(service) != name:
                continue
            endpoint = KServeEndpoint(service, name)
            for candidate in endpoint.canaries:
                for action in endpoint.take_back(candidate):
                    assert isinstance(action, Apply)
                    await self._kube.apply(action.kind, namespace, action.name, action.body)

    async def _check_owner(self, run: Manifest, kind: str, body: Json) -> None:
        """Removes what a run left that had the same name and is gone.

        Raises:
            ConflictError: the object of that name is somebody else's.
            ApiException: 409, look again.
        """
        namespace, name = run["metadata"]["namespace"], body["metadata"]["name"]
        found = await self._kube.get(kind, namespace, name)
        if found is None or is_owned(found, run):
            return
        owners = [(owner.get("kind"), owner.get("name")) for owner in found["metadata"].get("ownerReferences") or []]
        if owners == [(run["kind"], run["metadata"]["name"])]:
            await self._kube.delete(kind, namespace, name)
            raise ApiException(status=HTTPStatus.CONFLICT, reason="left by an earlier run of this name")
        raise ConflictError(
            f"{kind} {name} exists already and belongs to {owner_of(found)}; "
            "give the run another name, or remove that object"
        )

    async def _act(self, run: Manifest, status: Json, action: Action) -> None:
        namespace = run["metadata"]["namespace"]
        match action:
            case Create(kind, body):
                if not await self._kube.create(kind, namespace, body):
                    await self._check_owner(run, kind, body)
            case DrawToken(body):
                # We may not read Secrets, so one of that name cannot be asked for its owner.
                token = {"stringData": {"token": secrets.token_urlsafe(32)}}
                await self._kube.create("Secret", namespace, body | token)
            case Apply(kind, name, body):
                await self._kube.apply(kind, namespace, name, body)
            case Patch("AlignmentRun", name, body):
                changed = await self._kube.patch("AlignmentRun", namespace, name, body)
                run["metadata"]["resourceVersion"] = changed["metadata"]["resourceVersion"]
            case Patch(kind, name, body):
                await self._kube.patch(kind, namespace, name, body)
            case Delete(kind, name):
                await self._kube.delete(kind, namespace, name)
            case SetAlias(alias):
                if self._registry is not None:
                    meta = run["metadata"]
                    await self._registry.set_alias(alias, meta["uid"], meta["name"], status["release"]["model"])

    async def _write(self, run: Manifest, status: Json) -> bool:
        """Writes a changed status against the version that was read; False when that is stale."""
        meta = run["metadata"]
        current = run.get("status") or {}
        if status == current:
            return True
        removed = {key: None for key in current if key not in status}
        body = {
            "metadata": {"resourceVersion": meta["resourceVersion"]},
            "status": {**removed, **_replacing(current, status)},
        }
        try:
            await self._kube.patch("AlignmentRun", meta["namespace"], meta["name"], body, "status")
        except ApiException as error:
            if error.status in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND):
                return False
            raise
        return True

    async def _explain(self, run: Manifest, message: str) -> None:
        """Leaves in the status why nothing moves."""
        log.warning("%s/%s: %s", run["metadata"]["namespace"], run["metadata"]["name"], message)
        status = read_status(run)
        generation = run["metadata"].get("generation", 0)
        conditions = with_condition(
            status.conditions, "Progressing", False, "Blocked", message, generation, self._clock()
        )
        await self._write(run, status.model_copy(update={"conditions": conditions, "message": message}).to_dict())

    async def _tell(self, run: Manifest, event: Event) -> None:
        """Writes a Kubernetes event; its name says what it is about, so that a repetition is refused."""
        meta = run["metadata"]
        identity = f"{meta['uid']}/{event.reason}/{event.key}"
        time = format_time(self._clock())
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{meta['name']}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
                "namespace": meta["namespace"],
            },
            "involvedObject": {
                "apiVersion": run["apiVersion"],
                "kind": run["kind"],
                **{key: meta[key] for key in ("name", "namespace", "uid")},
            },
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "message": event.message[:1024],
            "source": {"component": "steersman-controller"},
            "reportingComponent": "steersman-controller",
            "firstTimestamp": time,
            "lastTimestamp": time,
            "count": 1,
        }
        try:
            await self._kube.create("Event", meta["namespace"], body)
        except ApiException as error:
            log.warning("event %s of %s is lost (%s)", event.reason, meta["name"], explain(error))


def canary_of(service: Manifest) -> str | None:
    """Name of the run whose canary an InferenceService carries; None: it carries none."""
    if not service["spec"].get("canary"):
        return None
    return (service["metadata"].get("annotations") or {}).get(CANARY_OF)


def owner_of(item: Manifest) -> str:
    """Who has an object, for people."""
    meta = item["metadata"]
    for owner in meta.get("ownerReferences") or []:
        return f"{owner.get('kind')} {owner.get('name')}"
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    release = annotations.get("meta.helm.sh/release-name")
    if release:
        return f"the Helm release {release}"
    manager = labels.get("app.kubernetes.io/managed-by")
    return f"what {manager} manages" if manager else "nobody that is named"


def _replacing(current: Json, wanted: Json) -> Json:
    """A merge patch that turns `current` into `wanted`: keys that are gone are set to null, also in objects inside."""
    patch: Json = {}
    for key, value in wanted.items():
        old = current.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            patch[key] = {**{name: None for name in old if name not in value}, **_replacing(old, value)}
        elif value != old:
            patch[key] = value
    return patch
