"""What is asked while a gateway ends."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.metrics import Metrics
from services.gateway.middleware import FrontMiddleware
from services.gateway.testing import gateway_config


async def test_a_request_that_outlives_the_drain_is_told_to_ask_again() -> None:
    """The listener cancels what is left, and would answer 500 in its place."""
    at_work = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        at_work.set()
        await asyncio.Event().wait()

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    refusals: Any = SimpleNamespace(note=lambda *arguments: None)
    front = FrontMiddleware(app, gateway_config("127.0.0.1:9"), Metrics("m"), refusals, {})
    scope = {"type": "http", "method": "GET", "path": "/v1/feedback", "raw_path": b"/v1/feedback", "query_string": b"",
             "headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 1)}  # fmt: skip
    request = asyncio.create_task(front(scope, receive, send))
    await at_work.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    start, body = sent
    assert start["status"] == 503
    assert "ask again" in json.loads(body["body"])["error"]["message"]
