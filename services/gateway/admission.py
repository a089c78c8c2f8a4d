"""Admission control: so many answers at once, so many waiting, and 429 for the rest."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from steersman.errors import RateLimitedError


class Admission:
    """Places for answers, given in order of arrival.

    Retry-After is an estimate: how long those ahead will need at the recent time of an answer.
    """

    def __init__(self, places: int, queue: int, queue_seconds: float) -> None:
        self._places = places
        self._queue = queue
        self._queue_seconds = queue_seconds
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_seconds = 1.0
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Holds a place.

        Raises:
            RateLimitedError: the queue is full, or no place came free in time.
        """
        await self._enter()
        start = time.monotonic()
        try:
            yield
        finally:
            self._mean_seconds += 0.05 * (time.monotonic() - start - self._mean_seconds)
            self._leave()

    async def _enter(self) -> None:
        if self.running < self._places and not self._waiting:
            self.running += 1
            return
        if len(self._waiting) >= self._queue:
            raise self._refusal("The gateway is busy: its queue is full")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._queue_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise self._refusal("The gateway is busy: no place came free in time") from None
            raise

    def _leave(self) -> None:
        """Hands the place on, or gives it back."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    def _refusal(self, reason: str) -> RateLimitedError:
        wait = self._mean_seconds * (len(self._waiting) + 1) / self._places
        retry_after = min(max(wait, 1.0), 60.0)
        return RateLimitedError(f"{reason}; try again in {retry_after:.0f} s", retry_after=retry_after)
