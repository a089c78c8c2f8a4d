"""Batches the requests of several callers by token budget, one batch at a time on one thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from steersman.errors import InternalError, InvalidArgumentError, RateLimitedError, UnavailableError
from steersman.rpc.wire import REQUEST_ITEMS

log = logging.getLogger("steersman.rpc")

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_WAITING_ITEMS = REQUEST_ITEMS
"""Items of a request, and of all callers that wait; the next request is refused until there is room."""


@dataclass(eq=False)
class _Job(Generic[Item, Result]):
    items: Sequence[Item]
    costs: Sequence[int]
    done: asyncio.Future[list[Result]]
    results: dict[int, Result] = field(default_factory=dict)


class TokenBudgetBatcher(Generic[Item, Result]):
    """Runs `process` on batches whose cost stays within a budget (a single larger item runs alone).

    While a batch runs, arriving requests queue up; the next batch takes them together in order of
    arrival. A caller that goes away is dropped before its items run, so a cancellation stops the work
    after the running batch at the latest.

    With `merge=False` no batch holds items of two requests: what a request gets back then depends on
    nothing but itself, bit for bit.

    No caller waits for a batcher that is dead: whatever ends its task answers everyone, and the next
    request starts it again.
    """

    def __init__(
        self,
        process: Callable[[list[Item]], list[Result]],
        cost: Callable[[Item], int],
        budget: int,
        merge: bool = True,
        max_waiting: int = MAX_WAITING_ITEMS,
    ) -> None:
        """Args:
        process: one result an item; runs on the batcher's thread.
        cost: of an item, in units of the budget; runs on the event loop.
        max_waiting: items of a request, and of all callers together.
        """
        self._process = process
        self._cost = cost
        self._budget = budget
        self._merge = merge
        self._max_waiting = max_waiting
        self._queue: list[_Job[Item, Result]] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Results in the order of the items.

        Raises:
            InvalidArgumentError: more items than a request may hold.
            RateLimitedError: too much is waiting.
            UnavailableError: the batcher is closed.
            Exception: what `process` or `cost` raised reaches every caller of that batch.
        """
        if not items:
            return []
        if self._closed:
            raise UnavailableError("the service is shutting down; send the request again")
        if len(items) > self._max_waiting:
            raise InvalidArgumentError(f"{len(items)} items are too many; a request holds at most {self._max_waiting}")
        waiting = sum(len(job.items) - len(job.results) for job in self._queue if not job.done.done())
        if waiting and waiting + len(items) > self._max_waiting:
            raise RateLimitedError(
                f"{waiting} items wait already, and {len(items)} more are too many; try again in a second"
            )
        costs = [self._cost(item) for item in items]
        job: _Job[Item, Result] = _Job(items, costs, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)
        self._wake.set()
        return await job.done

    @property
    def waiting(self) -> int:
        """Requests that have not been answered."""
        return len(self._queue)

    async def close(self) -> None:
        """Answers what is queued with UnavailableError and ends the thread."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        self._answer_all(UnavailableError("the service is shutting down; send the request again"))
        self._thread.shutdown(wait=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._closed:
            return
        cause = None if task.cancelled() else task.exception()
        log.error("the batcher's task ended (%r); the next request starts it again", cause, exc_info=cause)
        self._answer_all(UnavailableError("the service stopped in the middle of its work; send the request again"))

    def _answer_all(self, error: Exception) -> None:
        for job in self._queue:
            _fail(job, error)
        self._queue.clear()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._queue = [job for job in self._queue if not job.done.done()]
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
                continue
            batch = self._next_batch()
            try:
                items = [job.items[index] for job, index in batch]
                results = await loop.run_in_executor(self._thread, self._process, items)
                if len(results) != len(items):
                    raise InternalError(f"{len(results)} results came for {len(items)} items; the engine has a defect")
            except Exception as error:
                for job, _ in batch:
                    _fail(job, error)
                continue
            for (job, index), result in zip(batch, results, strict=True):
                job.results[index] = result
                if len(job.results) == len(job.items) and not job.done.done():
                    job.done.set_result([job.results[i] for i in range(len(job.items))])

    def _next_batch(self) -> list[tuple[_Job[Item, Result], int]]:
        batch: list[tuple[_Job[Item, Result], int]] = []
        total = 0
        for job in self._queue:
            for index in range(len(job.results), len(job.items)):
                total += job.costs[index]
                if batch and total > self._budget:
                    return batch
                batch.append((job, index))
            if not self._merge:
                return batch
        return batch


def _fail(job: _Job[Item, Result], error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
