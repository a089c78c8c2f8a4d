"""An answer gives its place back however its stream ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import pytest

from services.gateway.answer import Answer
from steersman.errors import DeadlineError, InternalError, RateLimitedError
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse


@pytest.mark.parametrize("seconds", [math.inf, 0.05], ids=["closed", "not taken in time"])
async def test_a_stream_that_breaks_when_it_is_closed_keeps_no_place(seconds: float) -> None:
    async def stream(_: Answer) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        try:
            yield PolicyServiceChatResponse(delta="a")
        finally:
            raise ValueError("the connection is broken")

    ends: list[BaseException | None] = []
    ended = asyncio.Event()

    async def on_end(_: Answer, error: BaseException | None) -> None:
        ends.append(error)
        ended.set()

    question = SimpleNamespace(request=PolicyServiceChatRequest(n=1), model="m")
    answer = Answer("a", question, stream)  # type: ignore[arg-type]
    answer.on_end, answer.limit_seconds = on_end, seconds
    await answer.open()
    if seconds == math.inf:
        with pytest.raises(ValueError, match="connection"):
            await answer.close()
        assert ends == [None]
        return
    await asyncio.wait_for(ended.wait(), 60)
    assert isinstance(ends[0], DeadlineError)
    await answer.close()
    assert len(ends) == 1


@pytest.mark.parametrize("error", [RateLimitedError("The gateway is busy"), asyncio.CancelledError(), None])
async def test_an_answer_that_never_began_is_held_by_nothing(error: BaseException | None) -> None:
    """A flood of refusals filled the memory: the timer of each held its question until its time was over."""

    async def stream(_: Answer) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        if error is not None:
            raise error
        return
        yield

    question = SimpleNamespace(request=PolicyServiceChatRequest(n=1), model="m")
    answer = Answer("a", question, stream)  # type: ignore[arg-type]
    answer.limit_seconds = 600
    with pytest.raises((RateLimitedError, asyncio.CancelledError, InternalError)) as raised:
        await answer.open()
    assert raised.value is error if error else "before its first token" in str(raised.value)
    assert answer._timer is not None
    assert answer._timer.cancelled()
