"""The one path that every answer takes, whatever protocol asked for it.

    check -> quotas -> remember -> ground in records -> place in the queue -> generate on a replica -> record

REST (OpenAI), Open Inference Protocol and native gRPC only translate to `Question` and from `Answer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from services.gateway.admission import Admission
from services.gateway.answer import Answer, Question, replay
from services.gateway.auth.tokens import FeedbackTokens
from services.gateway.backends.pool import ReplicaPool
from services.gateway.config import GatewayConfig
from services.gateway.errors import BadRequestError
from services.gateway.idempotency import Claim, IdempotencyKeys
from services.gateway.memory import Memory
from services.gateway.metrics import Metrics
from services.gateway.quotas import Quotas
from services.gateway.recorder import Record, Recorder, audit_row
from services.gateway.store import storable
from services.gateway.tools.calls import as_calls
from services.gateway.tools.grounding import Grounding
from services.gateway.tracing import Tracer
from steersman.errors import DeadlineError, NotFoundError, SteersmanError, UnavailableError
from steersman.rpc.finish import finish_name
from steersman.store.engine import Store
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse

log = logging.getLogger("steersman.gateway")

_MOST_STOPS, _LONGEST_STOP = 16, 256


class Assistant:
    """Answers questions."""

    def __init__(
        self, config: GatewayConfig, pool: ReplicaPool, store: Store, tokens: FeedbackTokens, metrics: Metrics
    ) -> None:
        self.config = config
        self.pool = pool
        self.metrics = metrics
        limits = config.limits
        self.admission = Admission(limits.concurrent_answers, limits.queued_answers, limits.queue_seconds)
        self.recorder = Recorder(store)
        self.quotas = Quotas(store)
        self.memory = Memory(store, config.memory)
        self.grounding = Grounding(config.tools, store, metrics)
        self.tracer = Tracer(config.telemetry)
        self.draining = False
        self._tokens = tokens
        self._idempotency = IdempotencyKeys(store)
        metrics.gauge("running_answers", "Answers in generation.", lambda: self.admission.running)
        metrics.gauge("queued_answers", "Requests that wait for a place.", lambda: self.admission.waiting)
        metrics.gauge("unrecorded_answers", "Records that are not on disk yet.", lambda: self.recorder.backlog)
        metrics.gauge("weights_version", "Newest weights that a replica serves.", lambda: pool.weights_version)
        metrics.gauge("replica_retries", "Answers that another replica took over.", lambda: pool.retries)
        metrics.replicas(lambda: {target: info is not None for target, info in pool.infos.items()})

    @property
    def ready(self) -> bool:
        """Whether an answer can be given."""
        return self.pool.ready and not self.recorder.failing and not self.draining

    async def answer(self, question: Question) -> Answer:
        """Returns when the first token is there.

        Raises:
            BadRequestError: the question breaks a limit.
            NotFoundError: there is no such model or conversation.
            ConflictError: the idempotency key is taken.
            RateLimitedError: too many are asking, or this caller too often.
            UnavailableError: no replica can answer.
        """
        question.caller.require("chat")
        question = self.checked(question)
        if self.recorder.failing:
            raise UnavailableError("The gateway's database cannot be reached; try again later")
        await self.quotas.admit(question.caller)
        if not question.idempotency_key:
            return await self._begin(question, None)
        scope = "\n".join((question.caller.tenant, question.caller.customer_id, question.id_prefix))
        canonical = PolicyServiceChatRequest()
        canonical.CopyFrom(question.request)
        canonical.sampling.ClearField("seed")
        canonical.ClearField("whole")
        claim = await self._idempotency.claim(
            scope, question.idempotency_key, canonical.SerializeToString(deterministic=True)
        )
        if not isinstance(claim, Claim):
            answer = replay(question, claim)
            await answer.open()
            return answer
        try:
            return await self._begin(question, claim)
        except BaseException:
            await self._idempotency.release(claim)
            raise

    async def _begin(self, question: Question, claim: Claim | None) -> Answer:
        question = await self._in_context(question)
        answer = Answer(f"{question.id_prefix}-{secrets.token_hex(12)}", question, self._stream)
        answer.model = question.model or self.config.model
        answer.adapter = self.pool.served
        answer.limit_seconds = self.config.limits.answer_seconds
        answer.trace = self.tracer.start(answer, answer.model)
        answer.feedback_token = self._tokens.issue(answer.id, question.caller.tenant)

        async def on_end(answer: Answer, error: BaseException | None) -> None:
            answer.trace.end(answer, _outcome(answer, error), error)
            await self._finish(answer, claim, error)

        answer.on_end = on_end
        await answer.open()
        return answer

    def checked(self, question: Question) -> Question:
        """The question with the defaults filled in; refuses what breaks a limit."""
        config, limits, request = self.config, self.config.limits, question.draft()
        if question.model and question.model not in config.model_names:
            raise NotFoundError(
                f"The model '{question.model}' does not exist here; use '{config.model}'",
                details={"param": "model", "code": "model_not_found"},
            )
        if request.n > limits.choices:
            raise BadRequestError(f"n is {request.n}, the limit is {limits.choices}", param="n")
        if len(request.messages) > limits.messages:
            raise BadRequestError(
                f"The conversation has {len(request.messages)} messages, the limit is {limits.messages}; "
                "leave out the oldest",
                param="messages",
            )
        chars = len(request.prompt) + _chars(request.messages)
        if chars > limits.message_chars:
            raise BadRequestError(
                f"The text has {chars} characters, the limit is {limits.message_chars}; shorten it",
                param="messages",
                code="context_length_exceeded",
            )
        if len(request.stop) > _MOST_STOPS or any(not 1 <= len(stop) <= _LONGEST_STOP for stop in request.stop):
            raise BadRequestError(
                f"stop: send at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters", param="stop"
            )
        sampling = request.sampling
        if sampling.max_new_tokens > limits.max_tokens:
            raise BadRequestError(
                f"max_tokens is {sampling.max_new_tokens}, the limit is {limits.max_tokens}", param="max_tokens"
            )
        sampling.max_new_tokens = sampling.max_new_tokens or min(config.defaults.max_tokens, limits.max_tokens)
        if sampling.min_new_tokens > sampling.max_new_tokens:
            raise BadRequestError("min_tokens is larger than max_tokens", param="min_tokens")
        if not sampling.HasField("temperature"):
            sampling.temperature = config.defaults.temperature
        if not sampling.HasField("top_p"):
            sampling.top_p = config.defaults.top_p
        return replace(question, request=request)

    async def _in_context(self, question: Question) -> Question:
        """The question after the system prompt and the turns that are remembered; the oldest turns that do not fit the
        limits fall out."""
        request, limits, prompt = question.draft(), self.config.limits, self.config.defaults.system_prompt
        messages = list(question.request.messages)
        if question.conversation_id:
            places, chars = limits.messages - len(messages), limits.message_chars - _chars(messages)
            remembered = await self.memory.recall(question.caller, question.conversation_id)
            messages = [*_newest(remembered, places, chars), *messages]
        if prompt and messages and messages[0].role != "system":
            messages.insert(0, common_pb2.Message(role="system", content=prompt))
        request.ClearField("messages")
        request.messages.extend(messages)
        return replace(question, request=request)

    async def _stream(self, answer: Answer) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        def generate(request: PolicyServiceChatRequest) -> AsyncGenerator[PolicyServiceChatResponse, None]:
            return self._generate(request, answer.seconds_left)

        grounding = self.grounding
        source = grounding.answer(answer, generate) if grounding.has_systems else generate(answer.question.request)
        if answer.question.must_call:
            source = as_calls(source)
        async with self.admission.place(), contextlib.aclosing(source) as stream:
            async for response in stream:
                yield response

    async def _generate(
        self, request: PolicyServiceChatRequest, seconds: float
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        """One turn of the model; `seconds` are what is left of the answer's time."""
        try:
            if seconds <= 0:
                raise DeadlineError("No time is left")
            async with contextlib.aclosing(self.pool.stream(request, seconds)) as stream:
                async for response in stream:
                    yield response
        except DeadlineError:
            limit = self.config.limits.answer_seconds
            raise DeadlineError(f"The answer took longer than {limit:g} s; ask for fewer tokens") from None

    async def _finish(self, answer: Answer, claim: Claim | None, error: BaseException | None) -> None:
        """Counts and records; a complete answer is on disk before its last token is handed out."""
        caller, metrics = answer.question.caller, self.metrics
        outcome = _outcome(answer, error)
        metrics.answers.labels(outcome).inc()
        metrics.tokens.labels("prompt").inc(answer.prompt_tokens)
        metrics.tokens.labels("completion").inc(answer.completion_tokens)
        if answer.first_token_seconds:
            if not answer.question.request.whole:
                metrics.first_token.observe(answer.first_token_seconds)
            metrics.duration.observe(answer.seconds)
        self.quotas.charge(caller, answer.prompt_tokens + answer.completion_tokens)
        conversation = None
        if answer.complete and answer.question.conversation_id:
            conversation = self.memory.row(
                caller, answer.question.conversation_id, answer.question.request, answer.choices[0].text
            )
        record = Record(_audit_row(answer, outcome), tuple(_answer_rows(answer, self.config.deployment)), conversation)
        if not answer.complete:
            # Nobody waits for what broke off; it is still recorded.
            try:
                self.recorder.put(record)
            except SteersmanError:
                log.exception("a broken answer is not recorded", extra={"request_id": answer.question.request_id})
            if claim is not None:
                await asyncio.shield(self._idempotency.release(claim))
            return
        try:
            async with asyncio.timeout(self.config.limits.answer_seconds):
                await self.recorder.put(record)
        except TimeoutError:
            raise UnavailableError("The gateway's database cannot be reached, the answer is not stored") from None
        if claim is not None:
            await self._idempotency.complete(claim, answer.as_json())


def _chars(messages: Iterable[common_pb2.Message]) -> int:
    return sum(
        len(message.content) + sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
        for message in messages
    )


def _newest(turns: Sequence[common_pb2.Message], places: int, chars: int) -> Sequence[common_pb2.Message]:
    """The last turns that have a place and fit the characters."""
    first = len(turns)
    while first > 0 and places > 0 and len(turns[first - 1].content) <= chars:
        first -= 1
        places -= 1
        chars -= len(turns[first].content)
    return turns[first:]


def _outcome(answer: Answer, error: BaseException | None) -> str:
    if answer.complete:
        return finish_name(answer.choices[0].finish_reason)
    if isinstance(error, SteersmanError):
        return type(error).__name__
    return "cancelled"


def _audit_row(answer: Answer, outcome: str) -> dict[str, Any]:
    question = answer.question
    return audit_row(
        question.caller,
        question.request_id,
        "answer",
        outcome,
        answer.id,
        [source.as_json() for source in answer.sources],
        weights_version=str(answer.weights_version or ""),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        milliseconds=round(answer.seconds * 1000),
        # An answer in one piece has no first token.
        first_token_milliseconds=0 if question.request.whole else round(answer.first_token_seconds * 1000),
    )


def _answer_rows(answer: Answer, deployment: str) -> list[dict[str, Any]]:
    """Rows of `steersman.store.models.Answer`; choice 1 of an answer has the id `ID.1`."""
    question = answer.question
    prompt = [{"role": m.role, "content": storable(m.content)} for m in question.request.messages]
    if question.request.prompt:
        prompt = [{"role": "user", "content": storable(question.request.prompt)}]
    return [
        {
            "id": f"{answer.id}.{index}" if index else answer.id,
            "conversation_id": question.conversation_id or None,
            "customer": question.caller.tenant,
            "deployment": deployment,
            "model": answer.model,
            "weights_version": str(answer.weights_version or ""),
            "prompt": prompt,
            "answer": storable(choice.text),
            "consent": None,
            "created_at": dt.datetime.fromtimestamp(answer.created, dt.UTC),
        }
        for index, choice in enumerate(answer.choices)
    ]
