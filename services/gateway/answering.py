"""The one path that every answer takes, whatever protocol asked for it.

    check -> quotas -> remember -> ground in records -> place in the queue -> generate on a replica -> record

REST (OpenAI), Open Inference Protocol and native gRPC only translate to `Question` and from `Answer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from services.gateway.admission import Admission
from services.gateway.answer import Answer, Question, replay
from services.gateway.auth.tokens import FeedbackTokens
from services.gateway.backends.embeddings import EmbeddingPool
from services.gateway.backends.models import Line, Models
from services.gateway.config import GatewayConfig
from services.gateway.errors import BadRequestError
from services.gateway.idempotency import Claim, IdempotencyKeys
from services.gateway.leases import Leases
from services.gateway.memory import Memory
from services.gateway.metrics import Metrics
from services.gateway.quotas import Quotas, Reserved
from services.gateway.recorder import Record, Recorder
from services.gateway.tools.calls import as_calls, one_call
from services.gateway.tools.grounding import Grounding
from services.gateway.tracing import Tracer
from services.gateway.trail import answer_line, answer_rows, outcome_of
from steersman.background import Background
from steersman.errors import DeadlineError, SteersmanError, UnavailableError
from steersman.store.engine import Store
from steersman.store.models import Answer as StoredAnswer
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse

log = logging.getLogger("steersman.gateway")

_MOST_STOPS, _LONGEST_STOP = 16, 256


class Assistant:
    """Answers questions."""

    def __init__(
        self,
        config: GatewayConfig,
        models: Models,
        store: Store,
        tokens: FeedbackTokens,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.background = Background()
        self.models = models
        self.metrics = metrics
        limits = config.limits
        self.admission = Admission(limits.concurrent_answers, limits.queued_answers, limits.queue_seconds)
        self.recorder = Recorder(store)
        self.leases = Leases(store)
        self.quotas = Quotas(store, self.leases)
        self.memory = Memory(store, config.memory)
        self.grounding = Grounding(config.tools, store, metrics)
        self.embeddings = {model.name: EmbeddingPool(model) for model in config.embeddings}
        self.tracer = Tracer(config.telemetry)
        self.draining = False
        self._tokens = tokens
        self.idempotency = IdempotencyKeys(store, self.leases)
        self._store = store
        metrics.gauge("running_answers", "Answers in generation.", lambda: self.admission.running)
        metrics.gauge("queued_answers", "Requests that wait for a place.", lambda: self.admission.waiting)
        metrics.gauge("unrecorded_answers", "Records that are not on disk yet.", lambda: self.recorder.backlog)
        metrics.gauge(
            "weights_version", "Newest weights that a replica serves.", lambda: models.main.pool.weights_version
        )
        metrics.gauge("replica_retries", "Answers that another replica took over.", lambda: models.retries)
        metrics.replicas(lambda: {target: info is not None for target, info in models.infos.items()})

    @property
    def ready(self) -> bool:
        """Whether an answer can be given."""
        return self.models.ready and self.can_record and self.background.healthy and not self.draining

    @property
    def can_record(self) -> bool:
        """Whether what an answer leaves behind is being stored."""
        return not self.recorder.failing and "recorder" not in self.background.down

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
        if not self.can_record:
            raise UnavailableError("The gateway's database cannot be reached; try again later")
        claim = None
        if question.idempotency_key:
            found = await self.idempotency.claim(
                question.caller, question.id_prefix, question.idempotency_key, question.fingerprint
            )
            if not isinstance(found, Claim):
                return await self._replay(question, found)
            claim = found
        try:
            reserved = await self.quotas.reserve(question.caller, self._most_tokens(question))
        except BaseException:
            self._free(claim, None)
            raise
        try:
            question = await self._in_context(question)
        except BaseException:
            self._free(claim, reserved)
            raise
        return await self._begin(question, claim, reserved)

    async def _replay(self, question: Question, stored: dict[str, Any]) -> Answer:
        """The answer that the first request with this key got."""
        answer = replay(question, stored)
        answer.feedback_token = self._tokens.issue(answer.id, question.caller.tenant)
        await self.recorder.put(Record(answer_line(answer, "replay") | {"action": "replay"}))
        await answer.open()
        return answer

    def _most_tokens(self, question: Question) -> int:
        """What an answer may cost, about: nobody here can count the tokens of a prompt."""
        request = question.request
        most_samples, cost = self.models.most(question.model)
        chars = len(request.prompt) + _chars(request.messages) + len(request.tools_json)
        chars += 4 * len(request.prompt_token_ids)
        samples = request.n if request.n > 1 else most_samples
        return math.ceil((chars // 4 + request.sampling.max_new_tokens * samples) * cost)

    def _free(self, claim: Claim | None, reserved: Reserved | None) -> None:
        """Gives back what a request held that was never begun."""
        if claim is not None or reserved is not None:
            with contextlib.suppress(UnavailableError):  # then both run out by themselves
                self.recorder.put(Record(claim=claim, reserved=reserved))

    async def _begin(self, question: Question, claim: Claim | None, reserved: Reserved | None) -> Answer:
        line = await self._line(question)
        stream = functools.partial(self._stream, line=line)
        answer = Answer(f"{question.id_prefix}{secrets.token_hex(12)}", question, stream)
        _note(answer, line)
        answer.limit_seconds = self.config.limits.answer_seconds
        answer.trace = self.tracer.start(answer, answer.model)
        answer.feedback_token = self._tokens.issue(answer.id, question.caller.tenant)

        async def on_end(answer: Answer, error: BaseException | None) -> None:
            answer.trace.end(answer, outcome_of(answer, error), error)
            await self._finish(answer, line, claim, reserved, error)

        answer.on_end = on_end
        await answer.open()
        return answer

    def checked(self, question: Question) -> Question:
        """The question with the defaults filled in; refuses what breaks a limit."""
        config, limits, request = self.config, self.config.limits, question.draft()
        if question.model:
            self.models.check(question.model)
        if request.n > limits.choices:
            raise BadRequestError(f"n is {request.n}, the limit is {limits.choices}", param="n")
        if len(request.messages) > limits.messages:
            raise BadRequestError(
                f"The conversation has {len(request.messages)} messages, the limit is {limits.messages}; "
                "leave out the oldest",
                param="messages",
            )
        chars = len(request.prompt) + len(request.prompt_token_ids) + _chars(request.messages)
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
        remembered: list[common_pb2.Message] = []
        if question.conversation_id:
            remembered = await self.memory.recall(question.caller, question.conversation_id)
        elif question.previous:
            remembered = await self.memory.recall_answer(question.caller, question.previous)
        if remembered:
            places, chars = limits.messages - len(messages), limits.message_chars - _chars(messages)
            messages = [*_newest(remembered, places, chars), *messages]
        turns = tuple(messages)
        if question.instructions:
            messages = _instructed(messages, question.instructions)
        elif prompt and messages and messages[0].role != "system":
            messages.insert(0, common_pb2.Message(role="system", content=prompt))
        request.ClearField("messages")
        request.messages.extend(messages)
        return replace(question, request=request, turns=turns)

    async def _line(self, question: Question) -> Line:
        """Who answers a conversation: who answered it before, else what its weight and share decide."""
        model = variant = question.variant
        if (question.conversation_id or question.previous) and self.models.chooses(question.model):
            first = await asyncio.to_thread(self._first_answer, question)
            model, variant = first or (model, variant)
        said = next((message.content for message in question.request.messages if message.role == "user"), "")
        who = (question.caller.tenant, question.caller.customer_id)
        key = "\n".join((*who, question.conversation_id or said or question.request.prompt))
        return self.models.line(question.model, key, model, variant)

    def _first_answer(self, question: Question) -> tuple[str, str] | None:
        """Model and deployment of a conversation's first answer; None: there is none yet."""
        of_id = StoredAnswer.id == question.previous
        of_conversation = StoredAnswer.conversation_id == question.conversation_id
        first = (
            sa.select(StoredAnswer.model, StoredAnswer.deployment)
            .where(
                of_id if question.previous else of_conversation,
                StoredAnswer.customer == question.caller.tenant,
            )
            .order_by(StoredAnswer.created_at)
            .limit(1)
        )
        with self._store.reading() as session:
            return session.execute(first).tuples().first()

    async def _stream(self, answer: Answer, line: Line) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        def generate(request: PolicyServiceChatRequest) -> AsyncGenerator[PolicyServiceChatResponse, None]:
            return self._generate(answer, line, request)

        grounding = self.grounding
        source = grounding.answer(answer, generate) if grounding.has_systems else generate(answer.question.request)
        if answer.question.must_call:
            source = as_calls(source)
        if answer.question.single_call:
            source = one_call(source)
        async with self.admission.place(), contextlib.aclosing(source) as stream:
            async for response in stream:
                yield response

    async def _generate(
        self, answer: Answer, line: Line, request: PolicyServiceChatRequest
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        """One turn of the model; what it costs is counted as it comes, for it may end at any time."""
        prompt_tokens, completion_tokens, counted = 0, dict[int, int](), 0
        answer.unheard = True
        try:
            if answer.seconds_left <= 0:
                raise DeadlineError("No time is left")
            async with contextlib.aclosing(line.stream(request, answer.seconds_left)) as stream:
                async for response in stream:
                    if not counted:
                        _note(answer, line)
                    prompt_tokens = response.prompt_tokens or prompt_tokens
                    if response.completion_tokens:
                        completion_tokens[response.choice_index] = response.completion_tokens
                        answer.unheard = False
                    total = prompt_tokens + sum(completion_tokens.values())
                    answer.spent_tokens += (total - counted) * line.served.cost
                    counted = total
                    yield response
        except DeadlineError:
            limit = self.config.limits.answer_seconds
            raise DeadlineError(f"The answer took longer than {limit:g} s; ask for fewer tokens") from None

    async def _finish(
        self,
        answer: Answer,
        line: Line,
        claim: Claim | None,
        reserved: Reserved | None,
        error: BaseException | None,
    ) -> None:
        """Counts and records; a complete answer is on disk before its last token is handed out."""
        question, metrics = answer.question, self.metrics
        outcome = outcome_of(answer, error)
        model, variant = line.served.name, line.deployment
        metrics.answers.labels(outcome).inc()
        metrics.model_answers.labels(model, outcome).inc()
        if answer.variant:
            metrics.variant_answers.labels(outcome, variant).inc()
        for kind, tokens in (("prompt", answer.prompt_tokens), ("completion", answer.completion_tokens)):
            metrics.tokens.labels(kind).inc(tokens)
            metrics.model_tokens.labels(model, kind).inc(tokens)
        if answer.first_token_seconds:
            if not question.request.whole:
                metrics.first_token.observe(answer.first_token_seconds)
            metrics.duration.observe(answer.seconds)
            metrics.model_duration.labels(model).observe(answer.seconds)
            if answer.variant:
                metrics.variant_duration.labels(variant).observe(answer.seconds)
        spent = math.ceil(answer.spent_tokens)
        if answer.unheard and outcome == "cancelled" and reserved is not None:
            # Generated in one piece, and left before it came: nobody knows how much it was.
            spent = max(spent, reserved.tokens)
        conversation = None
        if answer.complete and question.conversation_id:
            conversation = self.memory.row(
                question.caller, question.conversation_id, question.request, answer.choices[0].text
            )
        elif answer.complete and question.keep is not None:
            said = answer.choices[0]
            turn = common_pb2.Message(role="assistant", content=said.text, tool_calls=said.tool_calls)
            turns = [*question.turns, turn]
            conversation = self.memory.answer_row(question.caller, answer.id, turns, question.keep(answer))
        record = Record(
            answer_line(answer, outcome),
            tuple(answer_rows(answer, variant, self.config.keeping)),
            conversation,
            claim,
            answer.as_json() if answer.complete and claim is not None else None,
            reserved,
            spent,
        )
        if not answer.complete:
            # Nobody waits for what broke off; it is still recorded.
            try:
                self.recorder.put(record)
            except SteersmanError:
                log.exception("a broken answer is not recorded", extra={"audit": record.audit})
            return
        try:
            async with asyncio.timeout(self.config.limits.answer_seconds):
                await self.recorder.put(record)
        except TimeoutError:
            raise UnavailableError("The gateway's database cannot be reached, the answer is not stored") from None


def _note(answer: Answer, line: Line) -> None:
    answer.model, answer.variant, answer.adapter = line.name, line.variant, line.adapter


def _chars(messages: Iterable[common_pb2.Message]) -> int:
    return sum(
        len(message.content) + sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
        for message in messages
    )


def _newest(turns: Sequence[common_pb2.Message], places: int, chars: int) -> Sequence[common_pb2.Message]:
    """The last turns that have a place and fit the characters."""
    first = len(turns)
    while first > 0 and places > 0 and (size := _chars([turns[first - 1]])) <= chars:
        first -= 1
        places -= 1
        chars -= size
    while first < len(turns) and turns[first].role == "tool":  # the call that it answers has no place
        first += 1
    return turns[first:]


def _instructed(messages: Sequence[common_pb2.Message], instructions: str) -> list[common_pb2.Message]:
    """The messages with instructions before them: many chat templates take one system message, the first."""
    if messages and messages[0].role == "system":
        return [common_pb2.Message(role="system", content=f"{instructions}\n\n{messages[0].content}"), *messages[1:]]
    return [common_pb2.Message(role="system", content=instructions), *messages]
