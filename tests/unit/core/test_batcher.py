"""The batcher answers every caller, whatever goes wrong behind it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from steersman.errors import InternalError, InvalidArgumentError, RateLimitedError, UnavailableError
from steersman.rpc.batcher import TokenBudgetBatcher

LIMIT = 20.0
"""Seconds after which a caller counts as hanging."""


async def answer(batcher: TokenBudgetBatcher[Any, Any], items: list[Any]) -> list[Any]:
    return await asyncio.wait_for(batcher.submit(items), LIMIT)


async def test_results_come_back_in_order_whatever_shares_a_batch() -> None:
    seen: list[list[int]] = []

    def process(items: list[int]) -> list[int]:
        seen.append(items)
        return [item * 10 for item in items]

    batcher = TokenBudgetBatcher(process, lambda item: item, budget=5)
    results = await asyncio.gather(*(answer(batcher, [n, n + 1]) for n in range(1, 6)))
    assert results == [[10 * n, 10 * n + 10] for n in range(1, 6)]
    assert all(len(batch) == 1 or sum(batch) <= 5 for batch in seen)
    await batcher.close()


@pytest.mark.parametrize("number", [0, 1, 3])
async def test_a_wrong_number_of_results_is_an_error_and_no_hang(number: int) -> None:
    batcher = TokenBudgetBatcher(lambda items: ["r"] * number, len, budget=10)
    with pytest.raises(InternalError, match=f"{number} results came for 2 items"):
        await answer(batcher, ["a", "b"])
    await batcher.close()


async def test_a_cost_that_fails_is_the_callers_own_error() -> None:
    def cost(item: str) -> int:
        if item == "bad":
            raise InvalidArgumentError("no cost")
        return 1

    batcher = TokenBudgetBatcher(lambda items: items, cost, budget=10)
    with pytest.raises(InvalidArgumentError, match="no cost"):
        await answer(batcher, ["a", "bad"])
    assert await answer(batcher, ["a"]) == ["a"]
    assert batcher.waiting == 0
    await batcher.close()


async def test_an_error_of_the_work_reaches_its_callers_and_no_others() -> None:
    def process(items: list[str]) -> list[str]:
        if "bad" in items:
            raise ValueError("broken")
        return items

    batcher = TokenBudgetBatcher(process, len, budget=3, merge=False)
    good, bad = await asyncio.gather(answer(batcher, ["ok"]), answer(batcher, ["bad"]), return_exceptions=True)
    assert good == ["ok"]
    assert isinstance(bad, ValueError)
    await batcher.close()


async def test_a_task_that_dies_answers_everyone_and_is_started_again() -> None:
    go = threading.Event()

    def process(items: list[str]) -> list[str]:
        go.wait(LIMIT)
        return items

    batcher = TokenBudgetBatcher(process, len, budget=1)
    waiting = [asyncio.create_task(answer(batcher, [name])) for name in ("a", "b", "c")]
    await asyncio.sleep(0.05)
    assert batcher._task is not None
    batcher._task.cancel()
    for ended in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(ended, UnavailableError)
    go.set()
    assert await answer(batcher, ["again"]) == ["again"]
    await batcher.close()


async def test_what_waits_is_bounded() -> None:
    go = threading.Event()

    def process(items: list[int]) -> list[int]:
        go.wait(LIMIT)
        return items

    batcher = TokenBudgetBatcher(process, lambda item: 1, budget=1, max_waiting=4)
    with pytest.raises(InvalidArgumentError, match="5 items are too many; a request holds at most 4"):
        await answer(batcher, [1, 2, 3, 4, 5])
    large = asyncio.create_task(answer(batcher, [1, 2, 3, 4]))
    await asyncio.sleep(0.05)
    with pytest.raises(RateLimitedError, match="4 items wait already"):
        await answer(batcher, [7])
    assert batcher.waiting == 1
    go.set()
    assert await large == [1, 2, 3, 4]
    assert await answer(batcher, [7]) == [7]
    await batcher.close()
    with pytest.raises(UnavailableError):
        await answer(batcher, [8])


async def test_a_caller_that_went_away_costs_nothing() -> None:
    go = threading.Event()
    done: list[int] = []

    def process(items: list[int]) -> list[int]:
        go.wait(LIMIT)
        done.extend(items)
        return items

    batcher = TokenBudgetBatcher(process, lambda item: 1, budget=1)
    first = asyncio.create_task(answer(batcher, [1]))
    await asyncio.sleep(0.05)
    gone = asyncio.create_task(answer(batcher, [2, 3]))
    last = asyncio.create_task(answer(batcher, [4]))
    await asyncio.sleep(0.05)
    gone.cancel()
    go.set()
    assert (await first, await last) == ([1], [4])
    assert done == [1, 4]
    await batcher.close()
