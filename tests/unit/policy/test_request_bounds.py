"""What a request may ask for has an end, whatever its numbers are."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from services.policy.engine import GenerationRequest, SamplingParams
from services.policy.requests import events_of
from steersman.errors import InvalidArgumentError
from steersman.generation import MAX_SAMPLES, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS

PROMPT = np.array([4, 5], np.int32)


@pytest.mark.parametrize(("prompts", "n"), [(1, 2**31 - 1), (2, MAX_SAMPLES // 2 + 1)])
def test_samples(prompts: int, n: int) -> None:
    with pytest.raises(InvalidArgumentError, match="a request makes 16,384 samples at most"):
        GenerationRequest("r", [PROMPT] * prompts, SamplingParams(max_new_tokens=1), n=n)
    GenerationRequest("r", [PROMPT] * 2, SamplingParams(max_new_tokens=1), n=MAX_SAMPLES // 2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_logprobs": MAX_TOP_LOGPROBS + 1}, "top_logprobs is 101"),
        ({"stop_token_ids": tuple(range(MAX_STOP_TOKENS + 1))}, "stop_token_ids is a list of 1025"),
    ],
)
def test_sampling(options: dict, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        SamplingParams(max_new_tokens=1, **options)


class Abandoned:
    """An engine that takes its time to accept a request."""

    def __init__(self) -> None:
        self.asked, self.go, self.cancelled = threading.Event(), threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None

    def submit(self, request: GenerationRequest, on_event: object) -> int:
        self.thread = threading.current_thread()
        self.asked.set()
        assert self.go.wait(20)
        return 7

    def cancel(self, handle: int) -> None:
        assert handle == 7
        self.cancelled.set()


async def test_a_large_request_is_taken_apart_beside_the_loop_and_cancelled_when_nobody_waits() -> None:
    engine = Abandoned()
    request = GenerationRequest("r", [PROMPT] * 16, SamplingParams(max_new_tokens=1), n=1000)
    waiting = asyncio.ensure_future(anext(events_of(engine, request)))  # type: ignore[arg-type]
    await asyncio.to_thread(engine.asked.wait, 20)
    assert engine.thread is not threading.main_thread()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    engine.go.set()
    assert await asyncio.to_thread(engine.cancelled.wait, 20)
