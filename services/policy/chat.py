"""Conversations on top of the token engine: chat template, incremental text, stop texts, tool calls."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from services.policy.constrain import json_constraint
from services.policy.engine import Engine, GenerationRequest, PromptScored, SampleFinished, TokenEvent
from services.policy.families import EFFORTS, effort_options, response_template, without_calls
from services.policy.reading import AnswerReader, TextStream
from services.policy.requests import events_of, sampling_params
from services.policy.token_bytes import TokenBytes
from steersman.errors import DataError, FailedPreconditionError, InvalidArgumentError
from steersman.rpc.conversation import append_response, from_message, from_tools_json
from steersman.rpc.finish import finish_reason
from steersman.v1 import common_pb2
from steersman.v1 import policy_pb2 as pb

if TYPE_CHECKING:
    from transformers.utils.chat_parsing.response_templates import ResponseTemplate

P = ParamSpec("P")
T = TypeVar("T")


_SCORES_AT_ONCE = 256
"""Tokens of a prompt in one response."""


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
        self._family: _Family | None = None
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

        if request.prompt_token_ids:
            if max(request.prompt_token_ids) >= 2**31:
                raise InvalidArgumentError("prompt_token_ids holds an id beyond 31 bits; use the model's tokenizer")
            return np.asarray(request.prompt_token_ids, dtype=np.int32)
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
        messages, beginning = _begun(request)
        options = self._options(request)
        try:
            ids = prompt_ids(self.tokenizer, messages, tools, options=options, beginning=beginning)
        except DataError as error:
            raise InvalidArgumentError(f"messages do not fit the model's chat template: {error.message}") from None
        return np.asarray(ids, dtype=np.int32)

    def reader(self, request: pb.PolicyServiceChatRequest) -> Callable[[], AnswerReader]:
        """Makes a reader for each choice of an answer; the request was encoded before."""
        stops = tuple(request.stop)
        if not request.messages or request.json_schema:  # the text is what was asked for
            dropped = frozenset(self.stop_ids if request.messages else ())
            return lambda: AnswerReader(TextStream(self.tokenizer, dropped), stops, None)
        from steersman.nn.render import answer_prefix

        family = self.family()
        tools = from_tools_json(request.tools_json)
        messages, beginning = _begun(request)
        options = self._options(request)
        prefix = answer_prefix(self.tokenizer, messages, tools, options=options, begun=bool(beginning))
        template = family.whole if request.tools_json else family.without_calls
        return lambda: AnswerReader(
            TextStream(self.tokenizer, family.dropped, family.kept), stops, template, prefix, tools, family.marks
        )

    def family(self) -> _Family:
        """How the model writes thoughts and calls."""
        if self._family is None:
            self._family = _family_of(self.tokenizer, self.stop_ids)
        return self._family

    def _options(self, request: pb.PolicyServiceChatRequest) -> dict[str, Any]:
        """Variables of the chat template for this request."""
        from steersman.nn.render import template_source

        effort = request.reasoning_effort
        if not effort:
            return {}
        options = effort_options(template_source(self.tokenizer), effort) if effort in EFFORTS else None
        if options is None:
            raise InvalidArgumentError(
                f"reasoning_effort: the model's chat template does not know {effort!r}; leave it out",
                details={"param": "reasoning_effort", "code": "unsupported"},
            )
        return options

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


@dataclass(frozen=True, slots=True)
class _Family:
    whole: ResponseTemplate
    without_calls: ResponseTemplate
    kept: frozenset[int]
    """Special tokens that the template reads."""
    dropped: frozenset[int]
    """All others, and those that end an answer, where the template does not read them."""
    marks: tuple[str, ...]
    """Names of the kept ones."""


def _family_of(tokenizer: Any, stop_ids: Sequence[int]) -> _Family:
    from transformers.utils.chat_parsing.response_templates import load_response_template

    template = response_template(tokenizer)
    written = json.dumps(template, ensure_ascii=False).replace("\\", "")
    special = {int(token) for token in tokenizer.all_special_ids} | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    names = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in special.union(stop_ids)}
    kept = {token: name for token, name in names.items() if name in written}
    return _Family(
        load_response_template(template),
        load_response_template(without_calls(template)),
        frozenset(kept),
        frozenset(names.keys() - kept.keys()),
        tuple(kept.values()),
    )


def _begun(request: pb.PolicyServiceChatRequest) -> tuple[list[dict[str, Any]], str]:
    """The conversation, and the beginning of its answer.

    Raises:
        InvalidArgumentError: what is to be continued is no message of the assistant.
    """
    messages = list(map(from_message, request.messages))
    if not request.continue_last:
        return messages, ""
    last = messages.pop()
    if last["role"] != "assistant" or last.get("tool_calls") or not messages:
        raise InvalidArgumentError("continue_last: the last message must be the assistant's, after one of another role")
    return messages, last["content"]


async def answer(
    engine: Engine, chat: ChatFormat, request: pb.PolicyServiceChatRequest
) -> AsyncIterator[pb.PolicyServiceChatResponse]:
    """Streams the choices of one conversation."""
    if any(not stop for stop in request.stop):
        raise InvalidArgumentError("stop holds an empty text, which would end every answer at once; leave it out")
    if request.prompt_logprobs and request.messages:
        raise InvalidArgumentError("prompt_logprobs are of a prompt that is continued, not of messages; leave one out")
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
        score_prompts=request.prompt_logprobs,
    )
    new_reader = await chat.beside_the_loop(chat.reader, request)
    prompt_text = await chat.beside_the_loop(chat.tokenizer.decode, prompt) if request.prompt_token_ids else ""
    readers = [new_reader() for _ in range(count)]
    held: dict[int, pb.PolicyServiceChatResponse] = {}
    begun: set[int] = set()
    ended: set[int] = set()
    calls: dict[int, list[common_pb2.ToolCall]] = defaultdict(list)
    async for event in events_of(engine, generation):
        if isinstance(event, PromptScored):
            for begin in range(0, len(prompt), _SCORES_AT_ONCE):
                yield pb.PolicyServiceChatResponse(
                    prompt_logprobs=await chat.beside_the_loop(_prompt_tokens, chat, prompt, event, begin),
                    prompt_tokens=len(prompt),
                    prompt_text="" if begin else prompt_text,
                )
            continue
        if not isinstance(event, (TokenEvent, SampleFinished)) or event.sample_index in ended:
            continue
        index = event.sample_index
        reader = readers[index]
        piece = reader.push(event.token_id) if isinstance(event, TokenEvent) else reader.finish()
        response = pb.PolicyServiceChatResponse(
            choice_index=index,
            delta=piece.text,
            reasoning_delta=piece.thoughts,
            prompt_tokens=len(prompt),
            completion_tokens=len(reader.ids),
            reasoning_tokens=reader.thought_tokens,
            prompt_text=prompt_text if index not in begun else "",
        )
        begun.add(index)
        calls[index] += piece.calls
        if isinstance(event, TokenEvent):
            response.tokens.append(_token(chat, event))
            response.weights_version = event.weights_version
            if not reader.stopped:
                if request.whole:
                    held[index] = append_response(held.get(index), response)
                else:
                    yield response
                continue
        else:
            response.finish_reason = finish_reason(event.finish_reason)
            versions = event.weights_versions
            response.weights_version = versions[-1] if versions else info.weights_version
        if reader.stopped:
            response.finish_reason = common_pb2.FINISH_REASON_STOP
        if calls[index]:
            response.tool_calls.extend(calls[index])
            response.finish_reason = common_pb2.FINISH_REASON_TOOL_CALLS
        ended.add(index)
        yield append_response(held.pop(index, None), response)
        if len(ended) == count:
            return


def _token(chat: ChatFormat, event: TokenEvent) -> pb.TokenLogprob:
    return _described(chat, event.token_id, event.logprob, event.top_logprobs)


def _prompt_tokens(chat: ChatFormat, prompt: np.ndarray, scored: PromptScored, begin: int) -> list[pb.TokenLogprob]:
    """The next tokens of a prompt; its first one has no log-probability."""
    found = []
    for place, token in enumerate(prompt[begin : begin + _SCORES_AT_ONCE].tolist(), start=begin - 1):
        if place < 0:
            found.append(_described(chat, token, 0.0, ()))
            continue
        top = zip(scored.top_ids[place].tolist(), scored.top_logprobs[place].tolist(), strict=True)
        found.append(_described(chat, token, float(scored.logprobs[place]), top))
    return found


def _described(chat: ChatFormat, token_id: int, logprob: float, top: Iterable[tuple[int, float]]) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token_id,
        text=chat.text_of(token_id),
        logprob=logprob,
        raw=chat.bytes_of(token_id),
        top=[
            pb.TokenAlternative(token_id=token, text=chat.text_of(token), logprob=value, raw=chat.bytes_of(token))
            for token, value in top
        ],
    )
