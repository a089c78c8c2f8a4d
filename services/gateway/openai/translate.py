"""From OpenAI's requests to the policy's, and from the policy's responses to OpenAI's."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from services.gateway.answer import Answer
from services.gateway.openai.schema import ChatCompletionRequest, ChatMessage, CompletionRequest, Tool
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, TokenLogprob

FINISH_REASONS: dict[int, str] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_CANCELLED: "stop",
    common_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def chat_request(body: ChatCompletionRequest) -> PolicyServiceChatRequest:
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
    )


def call_schema(tools: Sequence[Tool]) -> str:
    """JSON schema of one call of one of the tools, as text: what an answer that must be a call is constrained to.

    The names are those that models write in tool calls (Hermes format): `name` and `arguments`.
    """
    calls, shared = [], {}
    for index, tool in enumerate(tools):
        parameters = tool.function.parameters or {"type": "object", "additionalProperties": False}
        # References are from the root, so definitions move there, each tool's under names of its own.
        parameters = json.loads(json.dumps(parameters).replace('"#/$defs/', f'"#/$defs/{index}_'))
        shared.update({f"{index}_{name}": schema for name, schema in parameters.pop("$defs", {}).items()})
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return json.dumps(schema | ({"$defs": shared} if shared else {}))


def completion_request(body: CompletionRequest, prompt: str) -> PolicyServiceChatRequest:
    return PolicyServiceChatRequest(
        prompt=prompt,
        sampling=_sampling(body, body.max_tokens or 16),
        n=body.n or 1,
        stop=body.stops,
        top_logprobs=body.logprobs or 0,
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
    )


def usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def fingerprint(answer: Answer) -> str:
    """Which weights answered."""
    return f"weights-{answer.weights_version}"


def tool_calls(calls: Iterable[common_pb2.ToolCall], *, indexed: bool) -> list[dict[str, Any]]:
    """OpenAI's form of tool calls; in a stream each carries its index."""
    found = []
    for index, call in enumerate(calls):
        function = {"name": call.name, "arguments": call.arguments}
        item: dict[str, Any] = {"id": call.id, "type": "function", "function": function}
        found.append({"index": index, **item} if indexed else item)
    return found


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    content = [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.raw),
            "top_logprobs": [
                {"token": other.text, "logprob": other.logprob, "bytes": list(other.text.encode())}
                for other in token.top
            ],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
    """The legacy form; `offset` is the number of characters before these tokens."""
    texts, logprobs, tops, offsets = [], [], [], []
    for token in tokens:
        texts.append(token.text)
        logprobs.append(token.logprob)
        tops.append({other.text: other.logprob for other in token.top})
        offsets.append(offset)
        offset += len(token.text)
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
