"""A request whose samples are tasks of an event loop: each event reaches its caller, and one error ends them all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from steersman.errors import SteersmanError
from steersman.generation import Event, GenerationRequest, RequestFailed

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class InFlight:
    request: GenerationRequest
    on_event: Callable[[Event], None]
    tasks: set[asyncio.Task[None]] = field(default_factory=set, kw_only=True)
    cancelled: bool = field(default=False, kw_only=True)
    """By its caller: samples end with what they have."""
    ended: bool = field(default=False, kw_only=True)
    """By an error: nothing more is told."""

    def begin(self, sample: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(sample)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def deliver(self, event: Event) -> None:
        try:
            self.on_event(event)
        except Exception:
            logger.exception("a callback for engine events raised; the event is lost")

    def fail(self, error: SteersmanError) -> None:
        """Ends the request with one error; its other samples are dropped."""
        if not self.ended:
            self.ended = True
            self.deliver(RequestFailed(error))
        for task in self.tasks:
            task.cancel()
