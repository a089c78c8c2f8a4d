"""The objects of OpenAI's Responses API, and how they are made from an answer."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from services.gateway.answer import Answer
from services.gateway.openai.objects import About, TokenInfo, about
from services.gateway.openai.responses_schema import (
    FunctionCallItem,
    FunctionCallOutput,
    InputMessage,
    ResponsesRequest,
)
from steersman.errors import RateLimitedError, SteersmanError
from steersman.v1 import common_pb2

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenInfo]


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningPart(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningObject(TypedDict):
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningPart]


class FunctionCallObject(TypedDict):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | ReasoningObject | FunctionCallObject


class ResponseError(TypedDict):
    code: str
    message: str


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    background: bool
    error: ResponseError | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
    steersman: NotRequired[About]


def item_id(answer: Answer, kind: Literal["msg", "rs", "fc"], index: int | None = None) -> str:
    """Id of an item: it says of which response."""
    own = answer.id.partition("_")[2]
    return f"{kind}_{own}" if index is None else f"{kind}_{own}_{index}"


def response_of_item(item: str) -> str:
    """Id of the response that an item is of."""
    return f"resp_{item.partition('_')[2].partition('_')[0]}"


def message_item(answer: Answer, text: str, status: ItemStatus, logprobs: list[TokenInfo]) -> OutputMessage:
    return {
        "id": item_id(answer, "msg"),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [] if status == "in_progress" else [output_text(text, logprobs)],
    }


def output_text(text: str, logprobs: list[TokenInfo]) -> OutputText:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def reasoning_item(answer: Answer, text: str, status: ItemStatus) -> ReasoningObject:
    return {
        "id": item_id(answer, "rs"),
        "type": "reasoning",
        "status": status,
        "summary": [],
        "content": [] if status == "in_progress" else [{"type": "reasoning_text", "text": text}],
    }


def call_item(answer: Answer, index: int, call: common_pb2.ToolCall, status: ItemStatus) -> FunctionCallObject:
    return {
        "id": item_id(answer, "fc", index),
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": "" if status == "in_progress" else call.arguments,
    }


def output_items(answer: Answer, status: Status, logprobs: list[TokenInfo]) -> list[OutputItem]:
    """What the answer consists of so far: thoughts, text, calls."""
    if not answer.choices:
        return []
    choice = answer.choices[0]
    ended: ItemStatus = "completed" if status == "completed" else "incomplete"
    items: list[OutputItem] = []
    if choice.reasoning:
        items.append(reasoning_item(answer, choice.reasoning, "completed"))
    if choice.text or not (choice.tool_calls or choice.reasoning):
        items.append(message_item(answer, choice.text, ended, logprobs))
    items.extend(call_item(answer, index, call, "completed") for index, call in enumerate(choice.tool_calls))
    return items


def status_of(answer: Answer) -> Status:
    """Of an answer that has come to its end."""
    if answer.choices and answer.choices[0].finish_reason == common_pb2.FINISH_REASON_LENGTH:
        return "incomplete"
    return "completed"


def response_object(
    answer: Answer, body: ResponsesRequest, status: Status, logprobs: list[TokenInfo] | None = None
) -> ResponseObject:
    """Args:
    answer: as far as it has come.
    status: `in_progress` has neither output nor usage.
    logprobs: of the text, where they were asked for.
    """
    sampling = answer.question.request.sampling
    begun = status != "in_progress"
    found: ResponseObject = {
        "id": answer.id,
        "object": "response",
        "created_at": answer.created,
        "completed_at": answer.created + round(answer.seconds) if status == "completed" else None,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": answer.model,
        "output": output_items(answer, status, logprobs or []) if begun else [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": body.stored,
        "temperature": sampling.temperature,
        "text": _text_config(body),
        "tool_choice": _tool_choice(body),
        "tools": [{"strict": None, **tool.model_dump(exclude_none=True)} for tool in body.tools or []],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": usage(answer) if begun else None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
    if begun:
        found["steersman"] = about(answer)
    return found


def failed_response(answer: Answer, body: ResponsesRequest, error: SteersmanError) -> ResponseObject:
    code = "rate_limit_exceeded" if isinstance(error, RateLimitedError) else "server_error"
    return {**response_object(answer, body, "failed"), "error": {"code": code, "message": error.message}}


def usage(answer: Answer) -> ResponseUsage:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def input_items(answer_id: str, body: ResponsesRequest) -> list[dict[str, Any]]:
    """What was sent, as items that can be listed; references are resolved before."""
    own = answer_id.partition("_")[2]
    items: list[dict[str, Any]] = []
    for index, item in enumerate(body.items):
        given: dict[str, Any] = {"id": getattr(item, "id", None) or f"in_{own}_{index}", "status": "completed"}
        if isinstance(item, InputMessage):
            kind = "output_text" if item.role == "assistant" else "input_text"
            part: dict[str, Any] = {"type": kind, "text": item.text}
            if kind == "output_text":
                part["annotations"] = []
            items.append({**given, "type": "message", "role": item.role, "content": [part]})
        elif isinstance(item, FunctionCallItem):
            call = {"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            items.append({**given, **call})
        elif isinstance(item, FunctionCallOutput):
            items.append({**given, "type": "function_call_output", "call_id": item.call_id, "output": item.text})
    return items


def _text_config(body: ResponsesRequest) -> dict[str, Any]:
    said = body.text.format if body.text else None
    chosen = said.model_dump(exclude_none=True, by_alias=True) if said else {"type": "text"}
    return {"format": chosen, "verbosity": (body.text.verbosity if body.text else None) or "medium"}


def _tool_choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()
