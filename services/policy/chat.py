"""Conversations on top of the token engine: chat template, incremental text, stop texts, tool calls."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np

from services.policy.constrain import json_constraint
from services.policy.engine import Engine, GenerationRequest, SampleFinished, TokenEvent
from services.policy.requests import events_of, sampling_params
from services.policy.token_bytes import TokenBytes
from steersman.errors import DataError, FailedPreconditionError, InvalidArgumentError
from steersman.rpc.conversation import from_message, from_tools_json
from steersman.rpc.finish import finish_reason
from steersman.rpc.wire import append_response
from steersman.v1 import common_pb2
from steersman.v1 import policy_pb2 as pb

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
P = ParamSpec("P")
T = TypeVar("T")


MAX_STOPS, MAX_STOP_CHARACTERS = 16, 512
"""Stop texts of a request: every token of an answer is compared with them."""


class ChatFormat:
    """The tokenizer as the service needs it."""

    def __init__(self, tokenizer: Any, fingerprint: str, stop_ids: Sequence[int] = ()) -> None:
        """Args:
        tokenizer: a transformers tokenizer.
        fingerprint: of its vocabulary, as `steersman.nn.tokens.tokenizer_fingerprint` gives it.
        stop_ids: end an answer, as `steersman.nn.tokens.stop_ids` gives them.
        """
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.stop_ids = tuple(stop_ids)
        self.bytes_of = TokenBytes(tokenizer)
        self._knows_tools: bool | None = None
        # One thread: a tokenizer is not made for several that change its settings.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat-format")

    async def beside_the_loop(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Renders, tokenizes or compiles without holding up the streams of others."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *args, **kwargs))

    def check_fingerprint(self, theirs: str) -> None:
        """Refuses a caller with another vocabulary; an empty fingerprint is not checked."""
        if theirs and theirs != self.fingerprint:
            raise FailedPreconditionError(
                f"the caller's tokenizer ({theirs[:12]}) is not the service's ({self.fingerprint[:12]}); "
                "start both from the same model folder"
            )

    def encode(self, request: pb.PolicyServiceChatRequest) -> np.ndarray:
        """Token ids int32 [P] of the rendered conversation, ready for the assistant's turn.

        No text of the request becomes a control token, see `steersman.nn.render`.
        """
        from steersman.nn.render import prompt_ids, text_ids

        if request.prompt:
            return np.asarray(text_ids(self.tokenizer, request.prompt), dtype=np.int32)
        if not request.messages:
            raise InvalidArgumentError("messages is empty; send at least one message")
        if self.tokenizer.chat_template is None:
            raise FailedPreconditionError("the model has no chat template; use the completions API or another model")
        tools = from_tools_json(request.tools_json)
        # A schema has its effect without being shown.
        if tools and not request.json_schema and not self.knows_tools():
            raise InvalidArgumentError(
                "tools: the model's chat template does not show them to the model; leave them out or use another model",
                details={"param": "tools", "code": "unsupported"},
            )
        try:
            ids = prompt_ids(self.tokenizer, list(map(from_message, request.messages)), tools)
        except DataError as error:
            raise InvalidArgumentError(f"messages do not fit the model's chat template: {error.message}") from None
        return np.asarray(ids, dtype=np.int32)

    def knows_tools(self) -> bool:
        """Whether the chat template writes tools into the prompt."""
        from steersman.nn.render import prompt_ids

        if self._knows_tools is None:
            asked = [{"role": "user", "content": "x"}]
            function = {"name": "probe", "description": "probe", "parameters": {"type": "object", "properties": {}}}
            with_tools = prompt_ids(self.tokenizer, asked, [{"type": "function", "function": function}])
            self._knows_tools = list(with_tools) != list(prompt_ids(self.tokenizer, asked))
        return self._knows_tools

    def text_of(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id])


@dataclass
class TextStream:
    """Turns token ids into text as they arrive; holds back incomplete characters and possible stop texts.

    The two offsets are those of vLLM's and TGI's incremental detokenization: text is decoded from a few
    tokens back, because a token's text depends on its neighbours.
    """

    tokenizer: Any
    stop: Sequence[str] = ()
    hold: str = ""
    """From this text on everything is held back until the end; empty: nothing is."""
    ends: Sequence[int] = ()
    """Tokens that end an answer and are no text of it, special or not."""
    ids: list[int] = field(default_factory=list)
    text: str = ""
    """Everything decoded, stop texts excluded."""
    sent: int = 0
    stopped: bool = False
    _prefix: int = 0
    _read: int = 0

    def push(self, token_id: int) -> str:
        """Adds a token and returns the new text that is certain."""
        self.ids.append(token_id)
        before = self._decode(self.ids[self._prefix : self._read])
        now = self._decode(self.ids[self._prefix :])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self.text += now[len(before) :]
            self._prefix, self._read = self._read, len(self.ids)
        return self._emit(final=False)

    def finish(self) -> str:
        """The rest of the text."""
        before = self._decode(self.ids[self._prefix : self._read])
        self.text += self._decode(self.ids[self._prefix :])[len(before) :]
        self._prefix = self._read = len(self.ids)
        return self._emit(final=True)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([token for token in ids if token not in self.ends], skip_special_tokens=True)

    def _emit(self, final: bool) -> str:
        if self.stopped:
            return ""
        hits = [
            position for stop in self.stop if (position := self.text.find(stop, max(0, self.sent - len(stop)))) >= 0
        ]
        if hits:
            self.stopped = True
            self.text = self.text[: min(hits)]
            end = len(self.text)
        elif final:
            end = len(self.text)
        else:
            marks = [*self.stop, self.hold] if self.hold else self.stop
            end = len(self.text) - max((_overlap(self.text, mark) for mark in marks), default=0)
            if self.hold and (begin := self.text.find(self.hold, max(0, self.sent - len(self.hold)))) >= 0:
                end = min(end, begin)
        delta = self.text[self.sent : max(self.sent, end)]
        self.sent = max(self.sent, end)
        return delta


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def parse_tool_calls(text: str) -> list[common_pb2.ToolCall]:
    """Calls in the `<tool_call>{"name":..., "arguments":{...}}</tool_call>` form; malformed ones are left as text."""
    calls = []
    for begin, end in _call_spans(text):
        try:
            data = json.loads(text[begin + len(_OPEN) : end - len(_CLOSE)])
            arguments = data.get("arguments", {})
            name = data["name"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            continue
        calls.append(
            common_pb2.ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", name=str(name), arguments=json.dumps(arguments))
        )
    return calls


def without_tool_calls(text: str) -> str:
    kept, last = [], 0
    for begin, end in _call_spans(text):
        kept.append(text[last:begin])
        last = end
    return "".join([*kept, text[last:]]).rstrip()


def _call_spans(text: str) -> Iterator[tuple[int, int]]:
    """From each opening mark to the next closing one; linear, whatever a model writes."""
    end = 0
    while (begin := text.find(_OPEN, end)) >= 0 and (close := text.find(_CLOSE, begin)) >= 0:
        end = close + len(_CLOSE)
        # An opening mark that nothing closed is text before the call.
        yield text.rfind(_OPEN, begin, close), end


async def answer(
    engine: Engine, chat: ChatFormat, request: pb.PolicyServiceChatRequest
) -> AsyncIterator[pb.PolicyServiceChatResponse]:
    """Streams the choices of one conversation."""
    if any(not stop for stop in request.stop):
        raise InvalidArgumentError("stop holds an empty text, which would end every answer at once; leave it out")
    if len(request.stop) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in request.stop):
        longest = max(map(len, request.stop))
        raise InvalidArgumentError(
            f"stop holds {len(request.stop)} texts of up to {longest} characters; at most {MAX_STOPS} texts of "
            f"{MAX_STOP_CHARACTERS} characters are looked for"
        )
    prompt = await chat.beside_the_loop(chat.encode, request)
    count = request.n or 1
    info = engine.info()
    constraint = None
    if request.json_schema:
        constraint = await chat.beside_the_loop(json_constraint, chat.tokenizer, request.json_schema, info)
    params = sampling_params(request.sampling, request.top_logprobs)
    if request.messages:  # a turn ends as the template ends it; a text that is continued has no turns
        params = replace(params, stop_token_ids=tuple({*params.stop_token_ids, *chat.stop_ids}))
    generation = GenerationRequest(
        request_id=str(uuid.uuid4()),
        prompts=[prompt],
        params=params,
        n=count,
        stream=True,
        constraint=constraint,
    )
    # What may become a tool call is no text of the answer.
    hold = _OPEN if request.tools_json else ""
    streams = [TextStream(chat.tokenizer, tuple(request.stop), hold, chat.stop_ids) for _ in range(count)]
    held: dict[int, pb.PolicyServiceChatResponse] = {}
    ended: set[int] = set()
    async for event in events_of(engine, generation):
        if not isinstance(event, (TokenEvent, SampleFinished)) or event.sample_index in ended:
            continue
        index = event.sample_index
        stream = streams[index]
        if isinstance(event, TokenEvent):
            delta = stream.push(event.token_id)
            response = pb.PolicyServiceChatResponse(
                choice_index=index,
                delta=delta,
                tokens=[_token(chat, event)],
                prompt_tokens=len(prompt),
                completion_tokens=len(stream.ids),
                weights_version=event.weights_version,
            )
            if not stream.stopped:
                if request.whole:
                    held[index] = append_response(held.get(index), response)
                else:
                    yield response
                continue
            response.finish_reason = common_pb2.FINISH_REASON_STOP
        else:
            response = pb.PolicyServiceChatResponse(
                choice_index=index,
                delta=stream.finish(),
                finish_reason=finish_reason(event.finish_reason),
                prompt_tokens=len(prompt),
                completion_tokens=len(stream.ids),
                weights_version=event.weights_versions[-1] if event.weights_versions else info.weights_version,
            )
            if stream.stopped:
                response.finish_reason = common_pb2.FINISH_REASON_STOP
        if request.tools_json and (calls := parse_tool_calls(stream.text)):
            response.tool_calls.extend(calls)
            response.delta = without_tool_calls(response.delta)
            response.finish_reason = common_pb2.FINISH_REASON_TOOL_CALLS
        ended.add(index)
        yield append_response(held.pop(index, None), response)
        if len(ended) == count:
            return


def _token(chat: ChatFormat, event: TokenEvent) -> pb.TokenLogprob:
    text = chat.text_of(event.token_id)
    return pb.TokenLogprob(
        token_id=event.token_id,
        text=text,
        logprob=event.logprob,
        raw=chat.bytes_of(event.token_id),
        top=[
            pb.TokenAlternative(token_id=token, text=chat.text_of(token), logprob=logprob, raw=chat.bytes_of(token))
            for token, logprob in event.top_logprobs
        ],
    )
