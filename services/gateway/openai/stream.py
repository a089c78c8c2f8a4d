"""Answers read to their end, or sent as events; and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.answer import Answer
from services.gateway.errors import error_body
from steersman.errors import CancelledError, InternalError, SteersmanError
from steersman.v1.policy_pb2 import TokenLogprob

log = logging.getLogger("steersman.gateway")

T = TypeVar("T")

_TOKENS_AT_ONCE = 64

Take = Callable[[int, Sequence[TokenLogprob], bool], None]
"""Receives a few tokens of a choice, and whether they are of its prompt."""


def event(data: Any) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def collect(answer: Answer, take: Take | None = None) -> None:
    """Reads the answer to its end; `take` receives the tokens of every choice, a few at a time."""
    if take is None:
        await answer.read()
        return
    try:
        async for response in answer:
            for tokens, of_prompt in ((response.prompt_logprobs, True), (response.tokens, False)):
                for begin in range(0, len(tokens), _TOKENS_AT_ONCE):
                    take(response.choice_index, tokens[begin : begin + _TOKENS_AT_ONCE], of_prompt)
                    await asyncio.sleep(0)
    finally:
        await answer.close()


class EventStream(Response):
    """Sends events as they come; an error after the first becomes a last event in OpenAI's shape."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]]) -> None:
        """`close` ends what the events come from, also when the client went before the first."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(CancelledError):
                await until_disconnect(receive, self._send(send))
        finally:
            await self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except SteersmanError as error:
            await send({"type": "http.response.body", "body": event(error_body(error)), "more_body": True})
        except Exception:
            log.exception("a stream broke")
            broken = InternalError("The answer broke off because of an internal error; ask again")
            await send({"type": "http.response.body", "body": event(error_body(broken)), "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does the work; when the client goes away first, cancels it and raises CancelledError.

    The work runs in the calling task, as under `asyncio.timeout`; a small task watches the connection.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and not task.uncancel():
            raise CancelledError("The client went away") from None
        raise
    finally:
        watcher.cancel()
