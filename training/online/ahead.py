"""Generation that runs ahead of training by a bounded number of batches.

    step         0        1        2        3          staleness 1
    generation   |0 |1    |  |2   |  |3   |
    training        |0    |  |1   |  |2   |  |3

While step k trains, batches k+1 .. k+staleness are made. A batch is begun after the weights of at most `staleness`
steps before its own have been published, so no token in it is older than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes one batch a step, in order; a context manager, because a thread works for it."""

    def __init__(self, make: Callable[[int], T], steps: range, staleness: int) -> None:
        """Args:
        make: makes the batch of a step; called for one step at a time.
        steps: the steps to come.
        staleness: batches to be ahead; 0: `make` is called by `take` itself, so that nothing overlaps.
        """
        self._make = make
        self._steps = iter(steps)
        self._staleness = staleness
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead") if staleness else None
        self._begun: deque[Future[T]] = deque()

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=error is None, cancel_futures=True)

    def take(self) -> T:
        """The next step's batch; call it when the weights of the step before are published."""
        if self._thread is None:
            return self._make(next(self._steps))
        while len(self._begun) <= self._staleness and (step := next(self._steps, None)) is not None:
            self._begun.append(self._thread.submit(self._make, step))
        return self._begun.popleft().result()
