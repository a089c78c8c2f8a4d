"""Generation that runs ahead of training by a bounded number of batches.

    step         0        1        2        3          staleness 1
    generation   |0 |1    |  |2   |  |3   |
    training        |0    |  |1   |  |2   |  |3

While step k trains, batches k+1 .. k+staleness are made. A batch is begun after the weights of at most `staleness`
steps before its own have been published, so no token in it is older than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes one batch a step, in order; a context manager, because a thread works for it."""

    def __init__(self, make: Callable[[int], T], steps: range, staleness: int, ready: Sequence[T] = ()) -> None:
        """Args:
        make: makes the batch of a step; called for one step at a time.
        steps: the steps to come.
        staleness: batches to be ahead; 0: `make` is called by `take` itself, so that nothing overlaps.
        ready: batches of the first of the steps, made before the process was stopped.
        """
        self._make = make
        self._steps = iter(steps[len(ready) :])
        self._staleness = staleness
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead") if staleness else None
        self._begun: deque[Future[T]] = deque()
        for batch in ready:
            self._begun.append(Future())
            self._begun[-1].set_result(batch)

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
            return self._begun.popleft().result() if self._begun else self._make(next(self._steps))
        while len(self._begun) <= self._staleness and (step := next(self._steps, None)) is not None:
            self._begun.append(self._thread.submit(self._make, step))
        return self._begun.popleft().result()

    def finished(self) -> list[T]:
        """The batches that are begun, after waiting for them: what a checkpoint needs to go on as if nothing happened.

        Weights that are published afterwards made no token of them, so that they do not depend on timing.
        """
        return [future.result() for future in self._begun]
