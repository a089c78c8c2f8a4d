"""Batches the requests of several callers by token budget, one batch at a time on one thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from steersman.errors import UnavailableError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Job(Generic[Item, Result]):
    items: Sequence[Item]
    done: asyncio.Future[list[Result]]
    results: dict[int, Result] = field(default_factory=dict)


class TokenBudgetBatcher(Generic[Item, Result]):
    """Runs `process` on batches whose cost stays within a budget (a single larger item runs alone).

    While a batch runs, arriving requests queue up; the next batch takes them together in order of
    arrival. A caller that goes away is dropped before its items run, so a cancellation stops the work
    after the running batch at the latest.

    With `merge=False` no batch holds items of two requests: what a request gets back then depends on
    nothing but itself, bit for bit.
    """

    def __init__(
        self,
        process: Callable[[list[Item]], list[Result]],
        cost: Callable[[Item], int],
        budget: int,
        merge: bool = True,
    ) -> None:
        self._process = process
        self._cost = cost
        self._budget = budget
        self._merge = merge
        self._queue: list[_Job[Item, Result]] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._task: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Results in the order of the items; an exception of `process` reaches every caller of that batch."""
        if not items:
            return []
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        job: _Job[Item, Result] = _Job(items, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        self._wake.set()
        return await job.done

    @property
    def waiting(self) -> int:
        """Requests that have not been answered."""
        return len(self._queue)

    async def close(self) -> None:
        """Answers what is queued with UnavailableError and ends the thread."""
        if self._task is not None:
            self._task.cancel()
        for job in self._queue:
            if not job.done.done():
                job.done.set_exception(UnavailableError("the service is shutting down; send the request again"))
        self._thread.shutdown(wait=True)

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
                results = await loop.run_in_executor(
                    self._thread, self._process, [job.items[index] for job, index in batch]
                )
            except Exception as error:
                for job in {id(job): job for job, _ in batch}.values():
                    if not job.done.done():
                        job.done.set_exception(error)
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
                total += self._cost(job.items[index])
                if batch and total > self._budget:
                    return batch
                batch.append((job, index))
            if not self._merge:
                return batch
        return batch
