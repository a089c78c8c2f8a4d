"""The kopf operator: events only say which run to look at; `Reconciler` decides and acts.

`on.event` handlers keep nothing in the objects: no annotations, no finalizers of the framework, and an event that is
missed or comes twice does no harm, because a look at a run reads everything anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import kopf
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import ApiClient
from kubernetes.aio.client.exceptions import ApiException
from prometheus_client import Counter, Gauge, Histogram

from services.controller.cache import CachedKube
from services.controller.config import ControllerConfig, load_templates
from services.controller.health import Health, Probes, dry_look
from services.controller.kube import RESOURCES, Kube, explain
from services.controller.leader import lead
from services.controller.model import RUN_LABEL, Settings
from services.controller.reconcile import Backoff, Reconciler, canary_of
from services.controller.signals import LiveSignals
from services.controller.status import TERMINAL
from steersman import loading
from steersman.background import Background
from steersman.registry import Registry
from steersman.rpc.metrics import serve_metrics

log = logging.getLogger("steersman.controller")

Key = tuple[str, str]
"""Namespace and name of a run."""

LOOKS = Counter("steersman_controller_reconciles", "Looks at a run.", ["result"])
SECONDS = Histogram("steersman_controller_reconcile_seconds", "Time of a look at a run.")
RUNS = Gauge("steersman_controller_runs", "Runs by phase.", ["phase"])


_LOOKS_AT_ONCE = 16
_LOOK_SECONDS = 300.0
"""No look takes so long; one that does is given up, so that the run is looked at again."""


class Dispatcher:
    """Looks at each run one at a time, and at `_LOOKS_AT_ONCE` runs; what arrives meanwhile leads to one more look."""

    def __init__(self, look: Callable[[str, str], Awaitable[float | None]], backoff: Backoff) -> None:
        self._look = look
        self._backoff = backoff
        self._places = asyncio.Semaphore(_LOOKS_AT_ONCE)
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._busy: set[Key] = set()
        self._again: set[Key] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Asks for a look after `delay` seconds; an earlier one that is planned already stands."""
        loop = asyncio.get_running_loop()
        planned = self._timers.get(key)
        if planned is not None:
            if planned.when() <= loop.time() + delay:
                return
            planned.cancel()
        self._timers[key] = loop.call_later(delay, self._start, key)

    def _start(self, key: Key) -> None:
        self._timers.pop(key, None)
        if key in self._busy:
            self._again.add(key)
            return
        self._busy.add(key)
        task = asyncio.get_running_loop().create_task(self._run(key))
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, key))

    def _ended(self, key: Key, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._busy.discard(key)
        if task.cancelled() and not self._closed:  # killed from outside, perhaps before its first step
            self.add(key, self._backoff.failed(key))

    async def _run(self, key: Key) -> None:
        delay: float | None = None
        start = time.monotonic()
        try:
            async with self._places, asyncio.timeout(_LOOK_SECONDS):
                delay = await self._look(*key)
            LOOKS.labels("ok").inc()
        except Exception:
            delay = self._backoff.failed(key)
            log.exception("%s/%s: the look failed; trying again in %g s", *key, delay)
            LOOKS.labels("error").inc()
        finally:
            SECONDS.observe(time.monotonic() - start)
            self._busy.discard(key)
        if key in self._again:
            self._again.discard(key)
            delay = 0.0
        if delay is not None:
            self.add(key, max(delay, 0.05))

    async def close(self) -> None:
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def resync(
    kube: Kube, dispatcher: Dispatcher, namespaces: list[str], seconds: float, listed: Callable[[str], None]
) -> None:
    """Looks at every run that is not over, again and again: time passes without events.

    `listed` is told every namespace whose runs could be listed.
    """
    while True:
        counts: dict[str, int] = {}
        for namespace in namespaces:
            try:
                runs = await kube.list("AlignmentRun", namespace)
                services = await kube.list("InferenceService", namespace)
            except Exception as error:
                reason = explain(error) if isinstance(error, ApiException) else error
                log.warning("runs in %s cannot be listed (%s)", namespace, reason)
                continue
            listed(namespace)
            there = {run["metadata"]["name"] for run in runs}
            for name in {canary_of(service) for service in services} - there - {None}:
                dispatcher.add((namespace, str(name)))  # its canary is taken back
            for run in runs:
                phase = (run.get("status") or {}).get("phase", "Pending")
                counts[phase] = counts.get(phase, 0) + 1
                if phase not in TERMINAL:
                    dispatcher.add((namespace, run["metadata"]["name"]))
        RUNS.clear()
        for phase, number in counts.items():
            RUNS.labels(phase).set(number)
        await asyncio.sleep(seconds)


def build_registry(
    kube: CachedKube, reconciler: Reconciler, config: ControllerConfig, health: Health
) -> kopf.OperatorRegistry:
    """Handlers for the run itself and for everything that it owns."""
    registry = kopf.OperatorRegistry()
    dispatcher = Dispatcher(reconciler.reconcile, reconciler.backoff)
    background = Background()
    health.down = background.down

    @kopf.on.startup(registry=registry)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False  # events are written with the decision they belong to
        settings.scanning.disabled = True  # no cluster-wide rights: the kinds are known
        settings.watching.server_timeout = 300
        settings.watching.reconnect_backoff = 1.0
        await background.start()
        looks = partial(resync, kube, dispatcher, config.namespaces, config.resync_seconds, health.saw_runs)
        background.add("resync", looks)

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        await background.close()
        await dispatcher.close()

    @kopf.on.event("steersman.dev", "v1alpha1", "alignmentruns", registry=registry)
    async def run_changed(namespace: str | None, name: str | None, **_: Any) -> None:
        kube.changed("AlignmentRun", namespace or "")
        dispatcher.add((namespace or "", name or ""))

    def watch(kind: str) -> None:
        async def part_changed(namespace: str | None, labels: Any, **_: Any) -> None:
            kube.changed(kind, namespace or "")
            dispatcher.add((namespace or "", labels[RUN_LABEL]))

        at = RESOURCES[kind]
        labels = {RUN_LABEL: kopf.PRESENT}
        kopf.on.event(at.group, at.version, at.plural, labels=labels, registry=registry)(part_changed)

    for kind in ("Job", "StatefulSet", "Pod"):
        watch(kind)
    return registry


async def serve(config: ControllerConfig) -> None:
    """Runs the operator until a signal comes; with leader election, while it holds the Lease.

    Raises:
        ConfigError: templates are missing.
        UnavailableError: the API server or the Lease is lost; the process must start anew.
    """
    loading.done()
    templates = load_templates(config.templates)
    await kube_config.load_config()
    database = os.environ.get(config.database_env)
    signals = LiveSignals(config.prometheus_url, database) if config.prometheus_url and database else None
    model_registry = Registry(config.mlflow_url, config.registered_model) if config.mlflow_url else None
    if config.metrics_port is not None:
        serve_metrics(config.host, config.metrics_port)
    async with ApiClient() as client:
        kube = CachedKube(Kube(client))
        settings = Settings(
            templates,
            config.storage,
            signals is not None,
            stuck_seconds=config.stuck_seconds,
            gpu_resource=config.gpu_resource,
            tls=config.run_tls,
            certificates=config.run_certificates,
            network=config.run_network,
        )
        reconciler = Reconciler(kube, settings, signals=signals, registry=model_registry)
        health = Health(kube, config)
        probes = Probes(health, lambda: dry_look(kube, settings, config.namespaces))
        try:
            async with probes.on(config.health_port, config.host):
                await lead(
                    client,
                    config.leader_election,
                    lambda: _operate(build_registry(kube, reconciler, config, health), config, health),
                )
        finally:
            for source in (signals, model_registry):
                if source is not None:
                    await source.close()


async def _operate(registry: kopf.OperatorRegistry, config: ControllerConfig, health: Health) -> None:
    kopf.on.login(registry=registry)(kopf.login_via_client)  # a plain registry has no login of its own
    health.leading = True
    # After a signal kopf ends by cancelling itself.
    with contextlib.suppress(asyncio.CancelledError):
        await kopf.operator(
            registry=registry,
            namespaces=config.namespaces,
            standalone=True,
            ready_flag=health.watching,
            # kopf's own wants a name for the uid, which a pod's may not have.
            identity=socket.gethostname(),  # type: ignore[arg-type]
        )
