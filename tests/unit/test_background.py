"""Background tasks: what dies is begun anew, what is down is known, the end is the end."""

from __future__ import annotations

import asyncio

import pytest

from steersman.background import Background


async def settle() -> None:
    await asyncio.sleep(0.3)


async def test_a_task_that_dies_or_is_cancelled_is_begun_anew() -> None:
    begun = asyncio.Queue[int]()
    tasks, count = Background(), 0

    async def run() -> None:
        nonlocal count
        count += 1
        begun.put_nowait(count)
        if count == 1:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        await asyncio.Event().wait()

    await tasks.start()
    tasks.add("recorder", run)
    assert await begun.get() == 1
    await asyncio.sleep(0)
    assert "surrogates" in tasks.down["recorder"]
    assert not tasks.healthy
    assert await begun.get() == 2
    assert tasks.healthy
    tasks.tasks["recorder"].cancel()
    assert await begun.get() == 3
    assert tasks.restarts == 2
    tasks.tasks["recorder"].cancel()
    await asyncio.sleep(0.001)
    tasks.tasks["recorder"].cancel()  # in its pause
    assert await begun.get() == 4
    tasks.add("late", asyncio.Event().wait)  # type: ignore[arg-type]
    tasks.tasks["late"].cancel()  # before its first step
    await settle()
    assert set(tasks.tasks) == {"recorder", "late"}
    async with asyncio.timeout(5):
        await tasks.close()
    assert not tasks.tasks


async def test_a_task_that_returns_is_done_and_a_vital_one_is_missed() -> None:
    tasks = Background()
    await tasks.start()

    async def done() -> None:
        return

    async def vital() -> None:
        raise RuntimeError("gone")

    tasks.add("done", done)
    await settle()
    assert tasks.healthy
    assert not tasks.failed.is_set()
    tasks.add("vital", vital, restart=False)
    await asyncio.wait_for(tasks.failed.wait(), 5)
    assert tasks.down == {"vital": "RuntimeError: gone"}
    await tasks.close()


def test_a_loop_that_is_shut_down_ends_them() -> None:
    async def main() -> None:
        tasks = Background()
        await tasks.start()
        tasks.add("sleeper", asyncio.Event().wait)  # type: ignore[arg-type]
        await asyncio.sleep(0)

    asyncio.run(main())  # would not return if the task were begun anew


@pytest.mark.parametrize("n", [1, 3])
async def test_others_go_on_when_one_dies(n: int) -> None:
    tasks = Background()
    await tasks.start()
    ticks = 0

    async def steady() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    async def broken() -> None:
        raise ValueError

    tasks.add("steady", steady)
    for number in range(n):
        tasks.add(f"broken {number}", broken)
    await settle()
    assert ticks > 5
    assert len(tasks.down) == n
    await tasks.close()
