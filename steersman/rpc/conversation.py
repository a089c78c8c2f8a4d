"""Turns and tools as messages of the contract, and back: nothing of a conversation gets lost on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from steersman.errors import InvalidArgumentError
from steersman.v1 import common_pb2 as pb
from steersman.v1.policy_pb2 import PolicyServiceChatResponse


def to_message(message: Mapping[str, Any]) -> pb.Message:
    """The contract's form of a turn as data files and chat templates have it."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        arguments = function.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(pb.ToolCall(id=call.get("id") or "", name=function.get("name", ""), arguments=text))
    return pb.Message(
        role=message["role"],
        content=message.get("content") or "",
        tool_calls=calls,
        tool_call_id=message.get("tool_call_id") or "",
        name=message.get("name") or "",
        reasoning_content=message.get("reasoning_content") or "",
    )


def from_message(message: pb.Message) -> dict[str, Any]:
    """The inverse of `to_message`; what is not set is left out, the content is always there."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    for field in ("tool_call_id", "name", "reasoning_content"):
        if value := getattr(message, field):
            plain[field] = value
    return plain


def from_tools_json(text: str) -> list[dict[str, Any]] | None:
    """Tool definitions of a request; None where there are none.

    Raises:
        InvalidArgumentError: not a JSON array of objects.
    """
    if not text:
        return None
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"tools_json is not JSON ({error})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidArgumentError("tools_json must be a JSON array of tool definitions")
    return tools or None


def append_response(
    held: PolicyServiceChatResponse | None, response: PolicyServiceChatResponse
) -> PolicyServiceChatResponse:
    """What was held back of a choice, with its next response behind it."""
    if held is None:
        return response
    text, thoughts = held.delta + response.delta, held.reasoning_delta + response.reasoning_delta
    held.MergeFrom(response)
    held.delta, held.reasoning_delta = text, thoughts
    return held
