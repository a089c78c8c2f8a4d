"""From OpenAI's requests to the policy's."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from services.gateway.openai.references import check_references, moved
from services.gateway.openai.schema import ChatCompletionRequest, ChatMessage, CompletionRequest, JsonSchemaFormat, Tool
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest


def chat_request(body: ChatCompletionRequest) -> PolicyServiceChatRequest:
    if isinstance(body.response_format, JsonSchemaFormat):
        check_references(body.response_format.json_schema.schema_, "response_format.json_schema.schema")
    tools = [tool.model_dump(exclude_none=True) for tool in body.offered_tools]
    return PolicyServiceChatRequest(
        messages=[to_message(message) for message in body.messages],
        sampling=_sampling(body, body.length),
        n=body.n or 1,
        stop=body.stops,
        tools_json=json.dumps(tools) if tools else "",
        json_schema=call_schema(body.offered_tools) if body.must_call else body.json_schema,
        whole=not body.stream,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else 0,
        continue_last=body.continues,
        reasoning_effort=body.reasoning_effort or "",
    )


def call_schema(tools: Sequence[Tool]) -> str:
    """JSON schema of one call of one of the tools, as text: what an answer that must be a call is constrained to.

    The names are those that models write in tool calls (Hermes format): `name` and `arguments`.
    """
    calls, shared = [], {}
    for index, tool in enumerate(tools):
        parameters = tool.function.parameters or {"type": "object", "additionalProperties": False}
        # References are from the root, and every tool's own go with it.
        check_references(parameters, f"tools.{index}.function.parameters")
        shared[str(index)] = moved(parameters, f"/$defs/{index}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": {"$ref": f"#/$defs/{index}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return json.dumps(schema | {"$defs": shared})


def completion_request(body: CompletionRequest, prompt: str | list[int]) -> PolicyServiceChatRequest:
    return PolicyServiceChatRequest(
        prompt=prompt if isinstance(prompt, str) else "",
        prompt_token_ids=() if isinstance(prompt, str) else prompt,
        # An engine makes at least one token; where none is wanted it is left out of the answer.
        sampling=_sampling(body, 1 if body.max_tokens == 0 else body.max_tokens or 16),
        n=body.n or 1,
        stop=body.stops,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=body.scores_prompt,
        whole=not body.stream,
    )


def to_message(message: ChatMessage) -> common_pb2.Message:
    """The contract's form of a message."""
    calls = [
        common_pb2.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or []
    ]
    return common_pb2.Message(
        role="system" if message.role == "developer" else message.role,
        content=message.text,
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
        reasoning_content=message.reasoning_content or "",
    )


def _sampling(body: ChatCompletionRequest | CompletionRequest, length: int | None) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        max_new_tokens=length or 0,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k or 0,
        # A request without a seed wants another answer each time.
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        min_new_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
    )
