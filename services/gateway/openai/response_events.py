"""The events of a streamed response, in OpenAI's order and numbered.

created, in_progress
  for each item: output_item.added, its parts and deltas, ... .done, output_item.done
completed, or incomplete (the length limit, cancelled), or failed
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Literal

import orjson

from services.gateway.answer import Answer
from services.gateway.openai.objects import TokenInfo, token_infos
from services.gateway.openai.response_objects import (
    OutputItem,
    ResponseObject,
    Status,
    call_item,
    failed_response,
    message_item,
    output_text,
    reasoning_item,
    response_object,
    status_of,
)
from services.gateway.openai.responses_schema import ResponsesRequest
from steersman.errors import SteersmanError
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatResponse

_Kind = Literal["reasoning", "message"]


class ResponseEvents:
    """Of one response. The methods give what is to be sent."""

    def __init__(self, answer: Answer, body: ResponsesRequest) -> None:
        self._answer = answer
        self._body = body
        self._number = 0
        self._index = 0
        """Of the item that is open, or comes next."""
        self._open: _Kind | None = None
        self._done: set[_Kind] = set()
        self._text: list[str] = []
        """Of the open item."""
        self._logprobs: list[TokenInfo] = []

    async def all(self, responses: AsyncIterator[PolicyServiceChatResponse]) -> AsyncGenerator[bytes, None]:
        """From the first to the last; what breaks off ends with `response.failed`."""
        begun = self._response("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        try:
            async for response in responses:
                for event in self._taken(response):
                    yield event
        except SteersmanError as error:
            yield self._event("response.failed", response=failed_response(self._answer, self._body, error))
            return
        for event in self._ended("completed" if self._answer.complete else "cancelled"):
            yield event

    def _taken(self, response: PolicyServiceChatResponse) -> Iterator[bytes]:
        if response.reasoning_delta and "reasoning" not in self._done and self._open != "message":
            yield from self._opened("reasoning")
            yield self._delta("response.reasoning_text.delta", response.reasoning_delta)
        tokens = token_infos(response.tokens) if self._body.logprobs and not response.reasoning_delta else []
        if response.delta:
            yield from self._opened("message")
            yield self._delta("response.output_text.delta", response.delta, logprobs=tokens)
        self._logprobs += tokens
        if response.tool_calls:
            yield from self._closed("completed")
            for index, call in enumerate(response.tool_calls):
                yield from self._call(index, call)

    def _ended(self, outcome: Literal["completed", "cancelled"]) -> Iterator[bytes]:
        status: Status = status_of(self._answer) if outcome == "completed" else "cancelled"
        choice = self._answer.choices[0] if self._answer.choices else None
        if outcome == "completed" and choice is not None and not (choice.text or choice.reasoning or choice.tool_calls):
            yield from self._opened("message")  # an answer without a word is one
        yield from self._closed("completed" if status == "completed" else "incomplete")
        kind = "response.completed" if status == "completed" else "response.incomplete"
        yield self._event(kind, response=self._response(status))

    def _response(self, status: Status) -> ResponseObject:
        return response_object(self._answer, self._body, status, self._logprobs)

    def _opened(self, kind: _Kind) -> Iterator[bytes]:
        if self._open == kind:
            return
        yield from self._closed("completed")
        self._open = kind
        item = self._item("", "in_progress")
        yield self._event("response.output_item.added", output_index=self._index, item=item)
        yield self._event("response.content_part.added", **self._place(), part=self._part(""))

    def _closed(self, status: Literal["completed", "incomplete"]) -> Iterator[bytes]:
        """Ends the open item, if there is one."""
        if self._open is None:
            return
        text = "".join(self._text)
        if self._open == "message":
            yield self._event("response.output_text.done", **self._place(), text=text, logprobs=self._logprobs)
        else:
            yield self._event("response.reasoning_text.done", **self._place(), text=text)
        yield self._event("response.content_part.done", **self._place(), part=self._part(text))
        yield self._event("response.output_item.done", output_index=self._index, item=self._item(text, status))
        self._done.add(self._open)
        self._open = None
        self._text = []
        self._index += 1

    def _call(self, index: int, call: common_pb2.ToolCall) -> Iterator[bytes]:
        begun, done = (call_item(self._answer, index, call, status) for status in ("in_progress", "completed"))
        place = {"item_id": done["id"], "output_index": self._index}
        yield self._event("response.output_item.added", output_index=self._index, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        yield self._event("response.output_item.done", output_index=self._index, item=done)
        self._index += 1

    def _item(self, text: str, status: Literal["in_progress", "completed", "incomplete"]) -> OutputItem:
        if self._open == "message":
            return message_item(self._answer, text, status, self._logprobs)
        return reasoning_item(self._answer, text, status)

    def _part(self, text: str) -> Any:
        if self._open == "message":
            return output_text(text, self._logprobs)
        return {"type": "reasoning_text", "text": text}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item("", "in_progress")["id"], "output_index": self._index, "content_index": 0}

    def _delta(self, kind: str, delta: str, **more: Any) -> bytes:
        self._text.append(delta)
        return self._event(kind, **self._place(), delta=delta, **more)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


async def events_of(
    answer: Answer, body: ResponsesRequest, responses: AsyncGenerator[PolicyServiceChatResponse, None]
) -> AsyncGenerator[bytes, None]:
    """All events of a response, of which `responses` are the parts."""
    async with contextlib.aclosing(responses), contextlib.aclosing(ResponseEvents(answer, body).all(responses)) as all_:
        async for event in all_:
            yield event
