"""Answers that are tool calls: a constrained text becomes one, and where one is wanted there is one."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncGenerator

from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatResponse


async def as_calls(
    stream: AsyncGenerator[PolicyServiceChatResponse, None],
) -> AsyncGenerator[PolicyServiceChatResponse, None]:
    """The stream with every choice's text, `{"name": ..., "arguments": {...}}`, as a tool call in its last response.

    A text that the length limit cut off is no call; it stays text, and its finish reason says why.
    """
    texts: dict[int, list[str]] = {}
    async with contextlib.aclosing(stream) as responses:
        async for response in responses:
            said = texts.setdefault(response.choice_index, [])
            if response.delta:
                said.append(response.delta)
                response.ClearField("delta")
            if response.finish_reason:
                _finish(response, "".join(said))
            yield response


async def one_call(
    stream: AsyncGenerator[PolicyServiceChatResponse, None],
) -> AsyncGenerator[PolicyServiceChatResponse, None]:
    """The stream with the first tool call of every choice only."""
    called: set[int] = set()
    async with contextlib.aclosing(stream) as responses:
        async for response in responses:
            if response.tool_calls:
                del response.tool_calls[0 if response.choice_index in called else 1 :]
                called.add(response.choice_index)
            yield response


def _finish(response: PolicyServiceChatResponse, text: str) -> None:
    if not response.tool_calls:  # An engine that knows tool calls itself may have found it.
        try:
            call = json.loads(text)
            name, arguments = call["name"], json.dumps(call["arguments"])
        except (ValueError, KeyError, TypeError):
            response.delta = text
            return
        response.tool_calls.add(id=f"call_{secrets.token_hex(12)}", name=name, arguments=arguments)
    response.finish_reason = common_pb2.FINISH_REASON_TOOL_CALLS
