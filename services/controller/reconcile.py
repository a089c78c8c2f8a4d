"""Observe, plan, act, write the status: one look at one run."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus

from kubernetes.aio.client.exceptions import ApiException

from services.controller.kube import Kube, explain
from services.controller.model import (
    Action,
    Create,
    Delete,
    DrawToken,
    Event,
    Json,
    Manifest,
    Patch,
    SetAlias,
    Settings,
)
from services.controller.observe import as_written, observe
from services.controller.plan import plan, read_status
from services.controller.signals import LiveSignals
from services.controller.status import format_time, with_condition
from steersman.errors import UnavailableError
from steersman.registry import Registry

log = logging.getLogger("steersman.controller")

RETRY_SECONDS = 5.0


def utc_now() -> datetime:
    return datetime.now(UTC)


class Reconciler:
    """Brings runs to their desired state; one run at a time by one task, different runs at the same time."""

    def __init__(
        self,
        kube: Kube,
        settings: Settings,
        *,
        signals: LiveSignals | None = None,
        registry: Registry | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._kube = kube
        self._settings = settings
        self._signals = signals
        self._registry = registry
        self._clock = clock
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    async def reconcile(self, namespace: str, name: str) -> float | None:
        """Looks at one run.

        Returns:
            Seconds after which it should be looked at again without an event; None: only after one.
        """
        async with self._locks.setdefault((namespace, name), asyncio.Lock()):
            stored = await self._kube.get("AlignmentRun", namespace, name)
            if stored is None:
                self._locks.pop((namespace, name), None)
                return None
            run = as_written(stored)
            now = self._clock()
            decision = plan(run, await observe(self._kube, run, self._signals, now), self._settings, now)
            try:
                for action in decision.actions:
                    await self._act(run, decision.status, action)
            except ApiException as error:
                if error.status in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND):
                    return 0.0  # someone else wrote first: look again, decide anew
                await self._explain(run, f"the API server refuses a change ({explain(error)})")
                return RETRY_SECONDS
            except UnavailableError as error:
                await self._explain(run, str(error))
                return RETRY_SECONDS
            if not await self._write(run, decision.status):
                return 0.0
            for event in decision.events:
                await self._tell(run, event)
            return decision.requeue_seconds

    async def _act(self, run: Manifest, status: Json, action: Action) -> None:
        namespace = run["metadata"]["namespace"]
        match action:
            case Create(kind, body):
                await self._kube.create(kind, namespace, body)
            case DrawToken(body):
                await self._kube.create(
                    "Secret", namespace, body | {"stringData": {"token": secrets.token_urlsafe(32)}}
                )
            case Patch("AlignmentRun", name, body):
                changed = await self._kube.patch("AlignmentRun", namespace, name, body)
                run["metadata"]["resourceVersion"] = changed["metadata"]["resourceVersion"]  # type: ignore[index]
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
