"""OpenAI's Responses API: an adapter onto the path that chats take.

    input items -- stored ones looked up --> messages -> a chat request -> answer -> items, events

What is kept of a response lies in the memory of conversations under the response's id, for as long as that keeps
anything: its object, its input, and the conversation up to it, which `previous_response_id` continues.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import TypeAdapter, ValidationError

from services.gateway.answer import Answer, Question
from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.callers import Caller
from services.gateway.bodies import consent_of, fingerprint_of, json_response, plain_headers, read_body
from services.gateway.errors import BadRequestError, from_validation
from services.gateway.openai.documentation import INPUT_ITEMS_DOC, RESPONSE_CANCEL_DOC, RESPONSE_DOC, RESPONSES_DOC
from services.gateway.openai.objects import TokenInfo, token_infos
from services.gateway.openai.response_events import events_of
from services.gateway.openai.response_objects import (
    ResponseObject,
    input_items,
    response_object,
    response_of_item,
    status_of,
)
from services.gateway.openai.responses_schema import (
    FunctionCallItem,
    FunctionCallOutput,
    InputItem,
    InputMessage,
    ItemReference,
    ResponsesRequest,
)
from services.gateway.openai.schema import ChatCompletionRequest
from services.gateway.openai.stream import EventStream, until_disconnect
from services.gateway.openai.translate import chat_request
from services.gateway.recorder import Record, audit_row
from steersman.errors import NotFoundError
from steersman.v1.policy_pb2 import PolicyServiceChatResponse

_ITEM: TypeAdapter[Any] = TypeAdapter(InputItem)


@dataclass(slots=True, eq=False)
class _Running:
    """A response that is being streamed here."""

    answer: Answer
    body: ResponsesRequest
    owner: tuple[str, str]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)


def responses_router(assistant: Assistant, auth: Authenticator, prefix: str) -> APIRouter:
    router = APIRouter(prefix=f"{prefix}/responses", tags=["OpenAI"])
    running: dict[str, _Running] = {}
    memory = assistant.memory

    @router.post("", **RESPONSES_DOC)
    async def create_response(request: Request) -> Response:
        headers = plain_headers(request)
        caller = await auth.caller(headers)
        sent = await read_body(request, ResponsesRequest)
        caller.require("chat")
        body = await _resolved(assistant, caller, sent)

        def keep(answer: Answer) -> dict[str, Any]:
            return {
                "response": response_object(answer, body, status_of(answer)),
                "input": input_items(answer.id, body),
            }

        chat = as_chat(body)
        question = Question(
            caller,
            request.state.request_id,
            chat_request(chat),
            model=body.model,
            id_prefix="resp_",
            previous=body.previous_response_id or "",
            instructions=body.instructions or "",
            keep=keep if body.stored else None,
            idempotency_key=headers.get("idempotency-key", ""),
            fingerprint=fingerprint_of(sent),
            consent=consent_of(headers, body.consent),
            traceparent=headers.get("traceparent", ""),
            variant=headers.get("x-steersman-variant", ""),
            must_call=chat.must_call,
            single_call=body.parallel_tool_calls is False,
        )
        if not body.stream:
            return json_response(await until_disconnect(request.receive, _whole(assistant, question, body)))
        answer = await until_disconnect(request.receive, assistant.answer(question))
        entry = running[answer.id] = _Running(answer, body, _owner(caller))

        async def close() -> None:
            running.pop(answer.id, None)
            await answer.close()
            entry.stopped.set()

        return EventStream(events_of(answer, body, _until(entry.stop, answer)), close)

    @router.get("/{response_id}", **RESPONSE_DOC)
    async def retrieve_response(request: Request, response_id: str) -> Response:
        caller = await auth.caller(request.headers)
        caller.require("chat")
        if request.query_params.get("stream") == "true":
            raise BadRequestError("stream: a response is read again in one piece; leave it out", param="stream")
        return json_response((await memory.kept(caller, response_id))["response"])

    @router.get("/{response_id}/input_items", **INPUT_ITEMS_DOC)
    async def list_input_items(request: Request, response_id: str) -> Response:
        caller = await auth.caller(request.headers)
        caller.require("chat")
        return json_response(_page((await memory.kept(caller, response_id))["input"], request))

    @router.delete("/{response_id}", **RESPONSE_DOC)
    async def delete_response(request: Request, response_id: str) -> Response:
        caller = await auth.caller(request.headers)
        caller.require("chat")
        await memory.forget(caller, response_id)
        row = audit_row(caller, request.state.request_id, "forget", "deleted", response_id)
        await assistant.recorder.put(Record(row))
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.post("/{response_id}/cancel", **RESPONSE_CANCEL_DOC)
    async def cancel_response(request: Request, response_id: str) -> Response:
        caller = await auth.caller(request.headers)
        caller.require("chat")
        entry = running.get(response_id)
        if entry is None or entry.owner != _owner(caller):
            await memory.kept(caller, response_id)
            raise BadRequestError(f"The response '{response_id}' has ended; it cannot be cancelled any more")
        entry.stop.set()
        await entry.stopped.wait()
        return json_response(response_object(entry.answer, entry.body, "cancelled"))

    return router


def as_chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """The same request as a chat; its messages are without `instructions`."""
    chosen = body.tool_choice
    said = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
    if said is not None and said["type"] == "json_schema":
        said = {"type": said.pop("type"), "json_schema": said}
    try:
        return ChatCompletionRequest.model_validate(
            {
                "model": body.model,
                "messages": _messages(body),
                "max_completion_tokens": body.max_output_tokens,
                "temperature": body.temperature,
                "top_p": body.top_p,
                "seed": body.seed,
                "stream": body.stream,
                "logprobs": body.logprobs or None,
                "top_logprobs": body.top_logprobs if body.logprobs else None,
                "tools": [
                    {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                    for tool in body.tools or []
                ],
                "tool_choice": chosen
                if chosen is None or isinstance(chosen, str)
                else {"type": "function", "function": {"name": chosen.name}},
                "parallel_tool_calls": body.parallel_tool_calls,
                "response_format": said,
                "reasoning_effort": body.reasoning.effort if body.reasoning else None,
                "continue_final_message": False,
            }
        )
    except ValidationError as error:
        raise from_validation(error) from None


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Items as messages: calls one after the other are those of one turn, thoughts belong to what follows them."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    thoughts = ""
    for item in body.items:
        if isinstance(item, InputMessage):
            messages.append({"role": item.role, "content": item.text})
        elif isinstance(item, FunctionCallItem):
            names[item.call_id] = item.name
            if not messages or messages[-1]["role"] != "assistant" or thoughts:
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item.name, "arguments": item.arguments}
            messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
        elif isinstance(item, FunctionCallOutput):
            turn = {"role": "tool", "content": item.text, "tool_call_id": item.call_id, "name": names.get(item.call_id)}
            messages.append(turn)
        elif not isinstance(item, ItemReference):
            thoughts += item.text
            continue
        if thoughts and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thoughts
        thoughts = ""
    if not messages:
        raise BadRequestError("input: send at least one message", param="input")
    return messages


async def _resolved(assistant: Assistant, caller: Caller, body: ResponsesRequest) -> ResponsesRequest:
    """The body with what its references name in their place."""
    references = [item for item in body.items if isinstance(item, ItemReference)]
    if not references:
        return body
    found: dict[str, Any] = {}
    for response in dict.fromkeys(response_of_item(item.id) for item in references):
        with contextlib.suppress(NotFoundError):
            kept = await assistant.memory.kept(caller, response)
            found |= {each["id"]: each for each in (*kept["input"], *kept["response"]["output"])}
    for item in references:
        if item.id not in found:
            raise NotFoundError(
                f"There is no item '{item.id}'; send the item itself, or store responses",
                details={"param": "input", "code": "item_not_found"},
            )
    items = [_ITEM.validate_python(found[i.id]) if isinstance(i, ItemReference) else i for i in body.items]
    return body.model_copy(update={"input": items})


async def _whole(assistant: Assistant, question: Question, body: ResponsesRequest) -> ResponseObject:
    answer = await assistant.answer(question)
    logprobs: list[TokenInfo] = []
    try:
        async for response in answer:
            if body.logprobs and not response.reasoning_delta:
                logprobs += token_infos(response.tokens)
    finally:
        await answer.close()
    return response_object(answer, body, status_of(answer), logprobs)


async def _until(stop: asyncio.Event, answer: Answer) -> AsyncGenerator[PolicyServiceChatResponse, None]:
    """The answer's parts until it ends or is told to stop."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        async with contextlib.aclosing(aiter(answer)) as responses:
            while True:
                step = asyncio.ensure_future(anext(responses))
                try:
                    await asyncio.wait({step, stopping}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not step.done():
                        step.cancel()
                        await asyncio.wait({step})
                if step.cancelled():
                    return
                try:
                    yield step.result()
                except StopAsyncIteration:
                    return
    finally:
        stopping.cancel()


def _owner(caller: Caller) -> tuple[str, str]:
    return caller.tenant, caller.customer_id


def _page(items: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """Newest first, as OpenAI's lists are."""
    asked = request.query_params
    limit = asked.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit[:4]) <= 100:
        raise BadRequestError("limit must be a number from 1 to 100", param="limit")
    if asked.get("order", "desc") not in ("asc", "desc"):
        raise BadRequestError("order must be asc or desc", param="order")
    found = items if asked.get("order") == "asc" else items[::-1]
    after = asked.get("after")
    if after is not None:
        place = next((index for index, item in enumerate(found) if item["id"] == after), None)
        if place is None:
            raise BadRequestError("after names no item of this response", param="after")
        found = found[place + 1 :]
    page = found[: int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, **ends, "has_more": len(found) > len(page)}
