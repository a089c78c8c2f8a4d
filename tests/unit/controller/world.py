"""A cluster, a clock and a controller, for the tests of the operator."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from fake_kube import TEMPLATES, FakeKube

from services.controller.model import Settings
from services.controller.reconcile import Reconciler


class World:
    """A cluster, a clock and a controller that can be restarted."""

    def __init__(self) -> None:
        self.kube = FakeKube()
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.settings = Settings(TEMPLATES, can_watch=True)
        self.signals: Any = None
        self.registry: Any = None
        self.restart()

    def restart(self) -> None:
        """A new controller process: nothing in memory survives."""
        self.reconciler = Reconciler(
            self.kube,  # type: ignore[arg-type]
            self.settings,
            signals=self.signals,
            registry=self.registry,
            clock=lambda: self.now,
        )

    async def look(self, name: str = "demo", times: int = 1) -> dict[str, Any]:
        """Delivers an event `times` times; returns the status."""
        for _ in range(times):
            await self.reconciler.reconcile("ml", name)
        return self.status(name)

    async def settle(self, name: str = "demo", limit: int = 20) -> dict[str, Any]:
        """Looks until nothing is written any more."""
        for _ in range(limit):
            before = len(self.kube.writes)
            await self.reconciler.reconcile("ml", name)
            if len(self.kube.writes) == before:
                return self.status(name)
        raise AssertionError(f"not settled after {limit} looks: {self.kube.writes[-10:]}")

    def status(self, name: str = "demo") -> dict[str, Any]:
        run = self.kube.find("AlignmentRun", name)
        return (run or {}).get("status") or {}

    def later(self, **delta: float) -> None:
        self.now += timedelta(**delta)

    def events(self) -> list[str]:
        return [body["reason"] for (kind, _, _), body in self.kube.objects.items() if kind == "Event"]
