"""The background tasks of a process: one group that owns them, starts again what dies, and knows what is down.

    tasks = Background()
    await tasks.start()
    tasks.add("recorder", recorder.run)          # a coroutine function without arguments
    tasks.healthy, tasks.down                    # for readiness: "" or why each task that died is not running
    await tasks.close()

A task that raises, or that somebody cancels, is logged and begun anew after a pause that grows; one that returns has
done its work. A vital one (`restart=False`) is not begun anew: `failed` is set, and its process should end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger("steersman.background")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
_STEADY_SECONDS = 30.0
"""Whoever ran this long before it died is begun anew at once, as the first time."""


class Background:
    def __init__(self) -> None:
        self.down: dict[str, str] = {}
        """Tasks that died and do not run yet: name -> reason."""
        self.failed = asyncio.Event()
        """A vital task died."""
        self.restarts = 0
        self.tasks: dict[str, asyncio.Task[None]] = {}
        """Those that run, by name."""
        self._group: asyncio.TaskGroup | None = None
        self._runner: asyncio.Task[None] | None = None
        self._close = asyncio.Event()

    @property
    def healthy(self) -> bool:
        return not self.down

    async def start(self) -> None:
        ready = asyncio.Event()

        async def run() -> None:
            async with asyncio.TaskGroup() as self._group:
                ready.set()
                await self._close.wait()
                for task in self.tasks.values():
                    task.cancel()

        self._runner = asyncio.create_task(run(), name="background")
        await ready.wait()

    def add(self, name: str, run: Callable[[], Awaitable[None]], *, restart: bool = True) -> None:
        assert self._group is not None, "start() first"
        task = self._group.create_task(self._keep(name, run, restart), name=name)
        self.tasks[name] = task

        def done(task: asyncio.Task[None]) -> None:
            self.tasks.pop(name, None)
            if task.cancelled() and not self._ending:
                # Outside of its work: before its first step, or in the pause.
                self.restarts += 1
                self.add(name, run, restart=restart)

        task.add_done_callback(done)

    async def finished(self, name: str) -> None:
        """Returns when a task that was told to end has ended."""
        task = self.tasks.get(name)
        if task is not None:
            await asyncio.wait([task])

    async def close(self) -> None:
        """Cancels what still runs and waits for it."""
        self._close.set()
        if self._runner is not None:
            await asyncio.wait([self._runner])

    @property
    def _ending(self) -> bool:
        # A loop that is shut down cancels the runner together with everything else.
        return self._close.is_set() or self._runner is None or self._runner.cancelling() > 0

    async def _keep(self, name: str, run: Callable[[], Awaitable[None]], restart: bool) -> None:
        loop, pause = asyncio.get_running_loop(), _FIRST_PAUSE
        while True:
            began = loop.time()
            try:
                self.down.pop(name, None)
                await run()
                return
            except asyncio.CancelledError:
                if self._ending:
                    raise
                task = asyncio.current_task()
                assert task is not None
                task.uncancel()
                self.down[name] = "it was cancelled"
                log.error("a background task was cancelled", extra={"task_name": name})
            except Exception as error:
                self.down[name] = f"{type(error).__name__}: {error}"
                log.exception("a background task died", extra={"task_name": name})
            if not restart:
                self.failed.set()
                return
            self.restarts += 1
            pause = _FIRST_PAUSE if loop.time() - began > _STEADY_SECONDS else min(pause * 2, _LONGEST_PAUSE)
            await asyncio.sleep(pause)
