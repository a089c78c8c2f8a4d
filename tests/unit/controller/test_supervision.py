"""Nothing that works in the controller's background dies unseen: each of it is killed here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import kmock
import pytest
from api_server import ApiServer
from fake_kube import alignment_run, inference_service
from operators import PATIENCE, Operator, until

from services.controller import operator as controller
from services.controller.operator import Dispatcher
from services.controller.reconcile import Backoff, canary_of


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server, kmock.Server(server):
        yield server


async def test_a_resync_that_dies_is_begun_anew_and_readiness_knows(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True

    def sometimes(service: dict) -> str | None:
        if broken:
            raise KeyError("metadata")
        return canary_of(service)

    monkeypatch.setattr(controller, "canary_of", sometimes)
    api.kube.put(inference_service())
    async with Operator(api, resync=0.2) as running:
        await until(lambda: running.health.down)
        assert running.health.down["resync"] == "KeyError: 'metadata'"
        broken = False
        await until(lambda: not running.health.down)
        api.kube.put(alignment_run(stages=[{"sft": {}}]))
        await until(lambda: api.kube.find("Job", "demo-sft"))


@pytest.mark.parametrize("early", [False, True])
async def test_a_look_that_is_killed_is_made_again(early: bool) -> None:
    """In its middle, or before its first step."""
    looks, hang = asyncio.Queue[str](), True

    async def look(namespace: str, name: str) -> float | None:
        looks.put_nowait(name)
        if hang:
            await asyncio.Event().wait()
        return None

    dispatcher = Dispatcher(look, Backoff())
    dispatcher._start(("ml", "demo"))
    if not early:
        assert await looks.get() == "demo"
    hang = False
    for task in dispatcher._tasks:
        task.cancel()
    assert await asyncio.wait_for(looks.get(), PATIENCE) == "demo"
    await dispatcher.close()
    assert not dispatcher._timers or all(timer.cancelled() for timer in dispatcher._timers.values())
