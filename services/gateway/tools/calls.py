"""Answers that are constrained to a tool call: their text becomes the call."""

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
