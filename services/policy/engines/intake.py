"""What other threads hand to an engine's: samples to make, requests that nobody wants any more, new weights.

    callers: submit, cancel, swap      the engine's thread: take, take, ... end

Nothing that was handed over is lost: `take` gives it to the engine once, and `end` gives back what came too late.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from steersman.errors import SteersmanError, UnavailableError


class Handled(Protocol):
    handle: int
    """Of its request; given by `submit`."""


S = TypeVar("S", bound=Handled)


@dataclass(eq=False)
class Swap:
    """Prepared weights on their way to the engine's thread."""

    version: int
    place: Callable[[], object]
    """Puts them in place and returns what was there."""
    replaced: object = None
    """Freed by the caller's thread, not by the engine's."""
    done: threading.Event = field(default_factory=threading.Event)
    seconds: float = 0.0
    error: SteersmanError | None = None

    def end(self, error: SteersmanError | None = None) -> None:
        self.error = error
        self.done.set()


@dataclass(frozen=True)
class HandedOver(Generic[S]):
    samples: list[S]
    cancelled: set[int]
    """Handles."""
    swaps: list[Swap]
    open: bool
    """The engine was not closed."""


class Intake(Generic[S]):
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._next_handle = 0
        self._samples: deque[S] = deque()
        self._cancelled: set[int] = set()
        self._swaps: deque[Swap] = deque()

    @property
    def waiting(self) -> int:
        """Samples that were not taken yet."""
        return len(self._samples)

    def open(self) -> None:
        self._open = True

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()

    def submit(self, samples: Sequence[S]) -> int:
        """Hands over the samples of one request and returns its handle; raises UnavailableError when closed."""
        with self._changed:
            if not self._open:
                raise UnavailableError("the engine is closed; send the request to another replica")
            self._next_handle += 1
            for sample in samples:
                sample.handle = self._next_handle
            self._samples.extend(samples)
            self._changed.notify()
            return self._next_handle

    def cancel(self, handle: int) -> None:
        with self._changed:
            self._cancelled.add(handle)
            self._changed.notify()

    def swap(self, swap: Swap) -> None:
        """Hands over weights and waits until they are in place.

        Raises:
            UnavailableError: the engine is closed.
            SteersmanError: they could not be put in place.
        """
        with self._changed:
            if not self._open:
                raise UnavailableError("the engine is closed; start it before loading weights")
            self._swaps.append(swap)
            self._changed.notify()
        swap.done.wait()
        swap.replaced = None
        if swap.error is not None:
            raise swap.error

    def take(self, busy: bool) -> HandedOver[S]:
        """All that came; waits for something unless the engine is busy."""
        with self._changed:
            self._changed.wait_for(
                lambda: busy or not self._open or self._samples or self._swaps or self._cancelled,
            )
            return self._all()

    def end(self) -> HandedOver[S]:
        """Closed from now on: what is left, and whether it was open until now."""
        with self._changed:
            left, self._open = self._all(), False
            return left

    def _all(self) -> HandedOver[S]:
        taken = HandedOver(list(self._samples), self._cancelled, list(self._swaps), self._open)
        self._samples.clear()
        self._swaps.clear()
        self._cancelled = set()
        return taken
