"""The controller as a process would run it, against the API server mock."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import kopf
from api_server import ApiServer
from fake_kube import TEMPLATES
from kubernetes.aio.client import ApiClient, Configuration

from services.controller.cache import CachedKube
from services.controller.config import ControllerConfig, LeaderElection
from services.controller.health import Health
from services.controller.kube import Kube
from services.controller.leader import lead
from services.controller.model import Settings
from services.controller.operator import build_registry
from services.controller.reconcile import Reconciler

PATIENCE = 120.0
"""Seconds to wait for a state; no test depends on how long it takes."""
NEVER = 3600.0


class Operator:
    """The controller in a thread with an event loop of its own, as in a process of its own.

    kopf cancels what it finds in its loop when it stops, and ends by CancelledError itself.
    """

    def __init__(
        self, api: ApiServer, signals: Any = None, resync: float = NEVER, election: LeaderElection | None = None
    ) -> None:
        self._url = str(api.url).rstrip("/")
        self._election = election
        self._signals = signals
        self._resync = resync
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)

    async def __aenter__(self) -> Operator:
        self._thread.start()
        if self._election is None:
            assert await asyncio.to_thread(self._ready.wait, PATIENCE), "the operator did not start"
        return self

    @property
    def working(self) -> bool:
        """With leader election: whether it leads."""
        return self._ready.is_set()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.to_thread(self._thread.join, PATIENCE)
        assert not self._thread.is_alive(), "the operator did not stop"

    def _main(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._work())

    async def _work(self) -> None:
        config = ControllerConfig(namespaces=["ml"], resync_seconds=self._resync)
        settings = Settings(TEMPLATES, can_watch=self._signals is not None)
        async with ApiClient(Configuration(host=self._url)) as client:
            kube = CachedKube(Kube(client))
            reconciler = Reconciler(kube, settings, signals=self._signals)
            self.health = Health(kube, config)
            registry = build_registry(kube, reconciler, config, self.health)

            @kopf.on.login(registry=registry)
            def login(**_: Any) -> kopf.ConnectionInfo:
                return kopf.ConnectionInfo(server=self._url)

            @kopf.on.startup(registry=registry)
            def fast(settings: kopf.OperatorSettings, **_: Any) -> None:
                settings.watching.reconnect_backoff = 0.05
                settings.networking.error_backoffs = [0.05] * 20

            async def operate() -> None:
                await kopf.operator(
                    registry=registry, namespaces=["ml"], standalone=True, stop_flag=self._stop, ready_flag=self._ready
                )

            await lead(client, self._election, operate)


async def until(what: Callable[[], Any]) -> None:
    """Waits for a state of the API server."""
    for _ in range(int(PATIENCE / 0.02)):
        with contextlib.suppress(KeyError, TypeError):
            if what():
                return
        await asyncio.sleep(0.02)
    raise AssertionError("the state was not reached")
