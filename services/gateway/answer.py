"""A question on its way in and its answer on the way out."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from google.protobuf.json_format import MessageToDict

from services.gateway.auth.callers import Caller
from services.gateway.proposals import Proposal
from services.gateway.store import storable
from steersman.errors import DeadlineError, InternalError
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse

log = logging.getLogger("steersman.gateway")


@dataclass(frozen=True, slots=True)
class Question:
    """What was said, and who said it.

    Nothing changes it: whoever needs another request for the model takes a `draft`.
    """

    caller: Caller
    request_id: str
    request: PolicyServiceChatRequest
    """Messages or prompt, sampling; zero values mean 'not said'."""
    model: str = ""
    """Empty: the gateway's."""
    id_prefix: str = "chatcmpl-"
    """Of the answer's id; an idempotency key counts among answers with the same one."""
    conversation_id: str = ""
    """Continue this stored conversation; empty: none."""
    previous: str = ""
    """Continue what was kept of this answer, see `keep`; empty: nothing."""
    instructions: str = ""
    """The system message of this answer alone; empty: the gateway's."""
    keep: Callable[[Answer], dict[str, Any]] | None = None
    """What is kept of the answer beside its turns, to be read again and continued by its id; None: nothing is."""
    turns: tuple[common_pb2.Message, ...] = ()
    """The conversation up to the answer, without system prompt and instructions; made from `previous` and `request`."""
    idempotency_key: str = ""
    fingerprint: bytes = b""
    """All that the caller sent, except how it is to be delivered: the same key with another one is a conflict."""
    consent: bool | None = None
    """Whether the end customer agreed to training on this; None: not said."""
    traceparent: str = ""
    """W3C trace context of the caller."""
    variant: str = ""
    """Of champion and candidate, who answered before, as the caller says; empty: unknown."""
    must_call: bool = False
    """The answer is constrained to a tool call, see `services.gateway.openai.translate.call_schema`."""
    single_call: bool = False
    """A turn makes at most one tool call; further ones of the model's are left out."""

    @property
    def beginning(self) -> str:
        """Of the answer, as the caller gave it to be continued; empty: none."""
        return self.request.messages[-1].content if self.request.continue_last else ""

    def draft(self) -> PolicyServiceChatRequest:
        """A copy of the request, to be changed."""
        copy = PolicyServiceChatRequest()
        copy.CopyFrom(self.request)
        return copy


@dataclass(frozen=True, slots=True)
class Source:
    """A business record that an answer used."""

    system: str
    record: str

    def as_json(self) -> dict[str, str]:
        return {"system": self.system, "record": self.record}


LookupOutcome = Literal["found", "not_found", "failed", "refused", "proposed"]


@dataclass(frozen=True, slots=True)
class Lookup:
    """One read from a business system, or one call of a tool of ours: what an answer rests on."""

    tool: str
    """Kind of record (order, invoice ...), or the tool's name."""
    arguments: Mapping[str, Any]
    """What was asked for: the number, or what the model wrote; never the customer."""
    outcome: LookupOutcome
    records: tuple[Source, ...] = ()
    """Where it came from; enough to read it again."""
    text: str = field(default="", repr=False)
    """What the model was shown. It holds data of customers: it is no part of the prompt, nor of `as_json`."""

    def as_json(self) -> dict[str, Any]:
        """By reference, without what was read."""
        return {
            "tool": self.tool,
            "arguments": dict(self.arguments),
            "outcome": self.outcome,
            "records": [source.as_json() for source in self.records],
        }


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a later judgement of an answer needs and nobody can reconstruct."""

    sampling: dict[str, Any]
    """As used, by the contract's field names."""
    variant: str
    """champion, candidate ...: the deployment that answered."""
    adapter: str
    """Model or adapter that the replica says it serves; empty: unknown."""
    weights_version: int
    token_ids: tuple[bytes, ...]
    """Of each choice, little-endian int32 [R]; empty where the engine does not tell them, or what was given is not what
    was generated."""
    logprobs: tuple[bytes, ...]
    """Of each choice, little-endian float32 [R], natural logarithm, see the engine's note."""
    tool_calls: tuple[tuple[common_pb2.ToolCall, ...], ...]
    """Calls for the caller to carry out, of each choice; the gateway's own are among the lookups."""
    lookups: tuple[Lookup, ...]
    """In the order in which they were made."""


@dataclass(slots=True, eq=False)
class Choice:
    """One choice of an answer, as far as it has been streamed."""

    parts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    tool_calls: list[common_pb2.ToolCall] = field(default_factory=list)
    finish_reason: int = 0
    tokens: int = 0
    reasoning_tokens: int = 0
    """How many of them are thoughts."""
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    logprobs: array[float] = field(default_factory=lambda: array("f"))

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def reasoning(self) -> str:
        """Thoughts of the model, which are no part of the answer."""
        return "".join(self.thoughts)


class Trace:
    """Follows one answer. This one tells nobody; `tracing.SpanTrace` does."""

    @contextmanager
    def tool(self, name: str, call_id: str = "") -> Iterator[None]:
        """Around one tool call or lookup."""
        yield

    def end(self, answer: Answer, outcome: str, error: BaseException | None) -> None:
        """Called once."""


class Answer:
    """An answer that is being streamed. Iterate it, and close it in any case.

    `on_end` runs once: before the last response is handed out, or when the answer breaks off.
    """

    def __init__(
        self,
        answer_id: str,
        question: Question,
        stream: Callable[[Answer], AsyncGenerator[PolicyServiceChatResponse, None]],
    ) -> None:
        self.id = answer_id
        self.question = question
        self.model = question.model
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.variant = ""
        """Of champion and candidate, who answers; empty: there is one model."""
        self.adapter = ""
        self.lookups: list[Lookup] = []
        self.proposals: list[Proposal] = []
        self.unsourced = 0
        """Sentences about records that no record supports; held back or marked."""
        self.limit_seconds = float("inf")
        self.spent_tokens = 0.0
        """Of all turns and samples, whether they are in the answer or not; by what a token of the model counts."""
        self.unheard = False
        """A turn ended before it said how many tokens it had."""
        self.prompt_tokens = 0
        self.prompt_text = ""
        """Of a prompt that came as token ids, where the engine tells it."""
        self.weights_version = 0
        self.feedback_token = ""
        self.trace = Trace()
        self.first_token_seconds = 0.0
        self.on_end: Callable[[Answer, BaseException | None], Awaitable[None]] | None = None
        self._start = time.monotonic()
        self._stream = stream(self)
        self._first: PolicyServiceChatResponse | None = None
        self._wanted = max(question.request.n, 1)
        self._finished = 0
        self._late: DeadlineError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def reasoning_tokens(self) -> int:
        """Those of `completion_tokens` that are thoughts."""
        return sum(choice.reasoning_tokens for choice in self.choices)

    @property
    def sources(self) -> list[Source]:
        """The business records that were read, each once."""
        return list(dict.fromkeys(source for lookup in self.lookups for source in lookup.records))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def seconds_left(self) -> float:
        return self.limit_seconds - self.seconds

    async def open(self) -> None:
        """Waits for the first response, so that errors before it can still change the status."""
        if math.isfinite(self.limit_seconds):
            self._timer = asyncio.get_running_loop().call_later(self.seconds_left, self._expire)
        try:
            self._first = await anext(self._stream)
        except StopAsyncIteration:
            error = InternalError("The policy service ended the answer before its first token; try again")
            await self._never_begun(error)
            raise error from None
        except BaseException as error:
            await self._never_begun(error)
            raise
        self.first_token_seconds = self.seconds

    async def _never_begun(self, error: BaseException) -> None:
        """Nobody gets this answer to close it, and its timer would hold all of it until its time is over."""
        self._stop_timer()
        await self._end(error)

    async def __aiter__(self) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        try:
            if self._first is not None:
                first, self._first = self._first, None
                await self._take(first)
                yield first
            async for response in self._stream:
                await self._take(response)
                yield response
            if self._late is not None and not self.complete:
                raise self._late
        except Exception as error:
            await self._end(error)
            raise

    async def read(self) -> None:
        """To its end; what it says is in `choices` then."""
        try:
            async for _ in self:
                pass
        finally:
            await self.close()

    async def close(self) -> None:
        """Stops the generation where it is still running."""
        self._stop_timer()
        if self._ending is not None:
            await asyncio.wait([self._ending])
        try:
            await self._stream.aclose()
        finally:
            await self._end(None)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self._ending = asyncio.create_task(self._end_late())

    async def _end_late(self) -> None:
        """Gives the place back although whoever reads does not take what is there."""
        self._late = DeadlineError(f"The answer was not taken within {self.limit_seconds:g} s; read it faster")
        try:
            await self._stream.aclose()
        except RuntimeError:
            # The model is being waited for; it has the same limit.
            self._timer = asyncio.get_running_loop().call_later(1.0, self._expire)
            return
        except Exception:
            log.exception("an answer that was not taken does not close well")
        await self._end(self._late)

    async def _take(self, response: PolicyServiceChatResponse) -> None:
        while len(self.choices) <= response.choice_index:
            self.choices.append(Choice())
        choice = self.choices[response.choice_index]
        if response.delta:
            choice.parts.append(response.delta)
        if response.reasoning_delta:
            choice.thoughts.append(response.reasoning_delta)
        if response.tool_calls:
            choice.tool_calls.extend(response.tool_calls)
        choice.token_ids.extend(token.token_id for token in response.tokens)
        choice.logprobs.extend(token.logprob for token in response.tokens)
        choice.tokens = response.completion_tokens or choice.tokens
        choice.reasoning_tokens = response.reasoning_tokens or choice.reasoning_tokens
        self.prompt_text = response.prompt_text or self.prompt_text
        self.prompt_tokens = response.prompt_tokens or self.prompt_tokens
        self.weights_version = response.weights_version or self.weights_version
        if response.finish_reason and not choice.finish_reason:
            choice.finish_reason = response.finish_reason
            self._finished += 1
            if self._finished == self._wanted:
                await self._end(None)

    async def _end(self, error: BaseException | None) -> None:
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            await on_end(self, error)

    @property
    def complete(self) -> bool:
        return self._finished == self._wanted

    def evidence(self, variant: str) -> Evidence:
        """For the record; `variant` is the deployment that answered."""
        # A continued beginning is part of the answer that is stored, and was not generated.
        changed = bool(self.unsourced or self.proposals or self.question.request.continue_last)
        return Evidence(
            sampling=MessageToDict(self.question.request.sampling, preserving_proto_field_name=True),
            variant=variant,
            adapter=self.adapter,
            weights_version=self.weights_version,
            token_ids=tuple(b"" if changed else _packed(choice.token_ids, "<i4") for choice in self.choices),
            logprobs=tuple(b"" if changed else _packed(choice.logprobs, "<f4") for choice in self.choices),
            tool_calls=tuple(tuple(c.tool_calls) for c in self.choices),
            lookups=tuple(self.lookups),
        )

    def as_json(self) -> dict[str, Any]:
        """What `replay` needs."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "proposals": [
                {"id": proposal.id, "action": proposal.action, "arguments": proposal.arguments}
                for proposal in self.proposals
            ],
            "prompt_tokens": self.prompt_tokens,
            "prompt_text": storable(self.prompt_text),
            "weights_version": self.weights_version,
            "lookups": [lookup.as_json() for lookup in self.lookups],
            "choices": [
                {
                    "text": storable(choice.text),
                    "reasoning": storable(choice.reasoning),
                    "finish_reason": choice.finish_reason,
                    "tokens": choice.tokens,
                    "reasoning_tokens": choice.reasoning_tokens,
                    "tool_calls": [[call.id, call.name, storable(call.arguments)] for call in choice.tool_calls],
                }
                for choice in self.choices
            ],
        }


def _packed(values: array[Any], dtype: str) -> bytes:
    """Engines behind other protocols tell no token ids: then all of them are 0, which is as good as none."""
    return np.asarray(values, dtype).tobytes() if any(values) else b""


def replay(question: Question, stored: dict[str, Any]) -> Answer:
    """An answer that was given before, in one piece; token log-probabilities are not kept."""

    async def stream(answer: Answer) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        for index, choice in enumerate(stored["choices"]):
            yield PolicyServiceChatResponse(
                choice_index=index,
                delta=choice["text"],
                reasoning_delta=choice.get("reasoning", ""),
                finish_reason=choice["finish_reason"],
                completion_tokens=choice["tokens"],
                reasoning_tokens=choice.get("reasoning_tokens", 0),
                prompt_text=stored.get("prompt_text", ""),
                prompt_tokens=stored["prompt_tokens"],
                weights_version=stored["weights_version"],
                tool_calls=[
                    common_pb2.ToolCall(id=call_id, name=name, arguments=arguments)
                    for call_id, name, arguments in choice["tool_calls"]
                ],
            )

    answer = Answer(stored["id"], question, stream)
    answer.created = stored["created"]
    answer.model = stored.get("model", question.model)
    answer.proposals = [Proposal(**proposal) for proposal in stored.get("proposals", ())]
    answer.lookups = [
        Lookup(**{**lookup, "records": tuple(Source(**source) for source in lookup["records"])})
        for lookup in stored["lookups"]
    ]
    return answer
