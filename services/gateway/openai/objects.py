"""The objects of OpenAI's API that the gateway answers with, and how they are made from an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from orjson import Fragment

from services.gateway.answer import Answer
from services.gateway.openai.text_logprobs import TextLogprobs
from steersman.rpc.finish import openai_finish_name
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatResponse, TokenLogprob


class PromptDetails(TypedDict):
    cached_tokens: int


class CompletionDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Function(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    index: NotRequired[int]
    """Only in a stream."""
    id: str
    type: Literal["function"]
    function: Function


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenInfo(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenInfo]
    refusal: None


class About(TypedDict):
    """Our extension of OpenAI's objects."""

    answer_id: str
    feedback_token: str
    weights_version: int
    sources: list[dict[str, str]]
    unsourced: int
    proposed_actions: list[dict[str, Any]]
    variant: NotRequired[str]


class ChatMessageObject(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    """Thoughts, where the model has them apart from its answer."""
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessageObject
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    steersman: About


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    refusal: None
    tool_calls: list[ToolCall]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    steersman: NotRequired[About]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | Fragment | None
    finish_reason: str | None


class TextCompletion(TypedDict):
    """Whole, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str
    usage: NotRequired[Usage | None]
    steersman: NotRequired[About]


def usage(answers: Sequence[Answer]) -> Usage:
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.reasoning_tokens for answer in answers)},
    }


def fingerprint(answer: Answer) -> str:
    """Which weights answered."""
    return f"weights-{answer.weights_version}"


def about(answer: Answer) -> About:
    told: About = {
        "answer_id": answer.id,
        "feedback_token": answer.feedback_token,
        "weights_version": answer.weights_version,
        "sources": [source.as_json() for source in answer.sources],
        "unsourced": answer.unsourced,
        "proposed_actions": [proposal.as_json() for proposal in answer.proposals],
    }
    if answer.variant:
        told["variant"] = answer.variant
    return told


def tool_calls(calls: Iterable[common_pb2.ToolCall]) -> list[ToolCall]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def token_infos(tokens: Iterable[TokenLogprob]) -> list[TokenInfo]:
    return [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.raw),
            "top_logprobs": [
                {"token": other.text, "logprob": other.logprob, "bytes": list(other.raw or other.text.encode())}
                for other in token.top
            ],
        }
        for token in tokens
    ]


def chat_completion(answer: Answer, logprobs: dict[int, list[TokenInfo]] | None) -> ChatCompletion:
    """Args:
    logprobs: by choice; None where they were not asked for.
    """
    choices: list[ChatChoice] = []
    for index, choice in enumerate(answer.choices):
        message: ChatMessageObject = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.tool_calls:
            message["tool_calls"] = tool_calls(choice.tool_calls)
            message["content"] = message["content"] or None
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": None if logprobs is None else {"content": logprobs.get(index, []), "refusal": None},
                "finish_reason": openai_finish_name(choice.finish_reason) or "stop",
            }
        )
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
        "usage": usage([answer]),
        "system_fingerprint": fingerprint(answer),
        "steersman": about(answer),
    }


def chat_chunk(answer: Answer, choices: list[ChatChunkChoice]) -> ChatChunk:
    return {
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": answer.model,
        "system_fingerprint": fingerprint(answer),
        "choices": choices,
    }


def chat_choice(response: PolicyServiceChatResponse, *, first: bool, logprobs: bool) -> ChatChunkChoice | None:
    """What a response adds to a stream; None when that is nothing."""
    delta: ChatDelta = {"role": "assistant", "content": "", "refusal": None} if first else {}
    if response.reasoning_delta:
        delta["reasoning_content"] = response.reasoning_delta
    if response.delta:
        delta["content"] = response.delta
    if response.tool_calls:
        calls = tool_calls(response.tool_calls)
        delta["tool_calls"] = [{**call, "index": index} for index, call in enumerate(calls)]
    finish = openai_finish_name(response.finish_reason)
    if not delta and finish is None and not (logprobs and response.tokens):
        return None
    content = token_infos(response.tokens) if logprobs else []
    return {
        "index": response.choice_index,
        "delta": delta,
        "logprobs": {"content": content, "refusal": None} if logprobs else None,
        "finish_reason": finish,
    }


def text_completion(answer: Answer, choices: list[TextChoice]) -> TextCompletion:
    return {
        "id": answer.id,
        "object": "text_completion",
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
        "system_fingerprint": fingerprint(answer),
    }
