"""An event loop on a thread of its own: results and errors come back, and its death leaves nobody waiting."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from steersman.errors import UnavailableError
from steersman.loop_thread import LoopThread

PATIENCE = 60


async def answer(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def broken() -> None:
    raise ValueError("wrong")


async def kill() -> None:
    raise SystemExit("the thread's end")


def test_results_and_errors_come_back_and_what_nobody_waits_for_is_told() -> None:
    loop, told = LoopThread("test"), threading.Event()
    assert loop.run(answer(3)) == 3
    with pytest.raises(ValueError, match="wrong"):
        loop.run(broken())
    loop.begin(broken(), lambda error: told.set() if isinstance(error, ValueError) else None)
    assert told.wait(PATIENCE)
    loop.begin(broken())
    assert loop.run(answer(4)) == 4
    loop.close()


def test_closing_cancels_what_runs_and_refuses_what_comes() -> None:
    ends: list[BaseException | None] = []
    loop = LoopThread("test", ends.append)
    begun, cancelled = threading.Event(), threading.Event()

    async def stubborn() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cancelled.set()

    with ThreadPoolExecutor(1) as caller:
        waiting = caller.submit(loop.run, stubborn())
        assert begun.wait(PATIENCE)
        loop.close()
        with pytest.raises(UnavailableError, match="test has stopped"):
            waiting.result(PATIENCE)
    assert cancelled.is_set()
    assert ends == [None]
    loop.close()
    with pytest.raises(UnavailableError, match="test has stopped"):
        loop.run(answer(1))
    with pytest.raises(UnavailableError, match="test has stopped"):
        loop.begin(answer(1))


def test_a_thread_that_is_killed_tells_it_and_everybody_who_waits() -> None:
    ends: list[BaseException | None] = []
    dead = threading.Event()
    loop = LoopThread("test", lambda cause: (ends.append(cause), dead.set()))  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(1) as caller:
        waiting = caller.submit(loop.run, asyncio.sleep(3600))
        loop.run(answer(1))
        loop.begin(kill())
        assert dead.wait(PATIENCE)
        with pytest.raises(UnavailableError, match="test has stopped"):
            waiting.result(PATIENCE)
    assert isinstance(ends[0], SystemExit)
    with pytest.raises(UnavailableError, match="test has stopped"):
        loop.run(answer(1))
    loop.close()
    assert len(ends) == 1
