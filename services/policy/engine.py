"""The interface of a generation engine, as the servicer sees it.

The data types live in `steersman.generation` (the fake engine in `steersman.testing` shares them) and are
re-exported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from steersman.generation import (
    LOGPROBS_NOTE,
    EngineInfo,
    Event,
    FinishReason,
    GenerationRequest,
    PromptScored,
    RequestFailed,
    SampleFinished,
    SamplingParams,
    TokenConstraint,
    TokenEvent,
    WeightsUpdate,
)

__all__ = [
    "LOGPROBS_NOTE",
    "Engine",
    "EngineInfo",
    "Event",
    "FinishReason",
    "GenerationRequest",
    "PromptScored",
    "RequestFailed",
    "SampleFinished",
    "SamplingParams",
    "TokenConstraint",
    "TokenEvent",
    "WeightsUpdate",
]


class Engine(Protocol):
    """Generates samples on a thread of its own. All methods may be called from any thread.

    A request ends with `n` times `len(prompts)` `SampleFinished` events, or with one `RequestFailed`. Every event
    is delivered exactly once, from the engine's thread: a callback must return quickly and must not raise.
    """

    def start(self) -> None:
        """Loads the model and starts the engine's thread; returns when requests are accepted."""
        ...

    def close(self) -> None:
        """Stops the thread and frees the memory. Requests in flight end with `RequestFailed` (UnavailableError)."""
        ...

    def info(self) -> EngineInfo: ...

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        """Queues a request and returns a handle for `cancel`.

        Raises InvalidArgumentError when the model cannot serve it and UnavailableError when the engine is closed;
        then no event follows.
        """
        ...

    def cancel(self, handle: int) -> None:
        """Ends a request's unfinished samples as 'cancelled' before the next token; unknown handles are ignored."""
        ...

    def load_weights(self, update: WeightsUpdate) -> float:
        """Replaces weights between two decode steps; samples in flight go on with the new ones.

        Blocks until every new token uses them and returns the seconds that generation stood still. On an error the
        old weights stay. Raises InvalidArgumentError when names or shapes do not fit the model.
        """
        ...
