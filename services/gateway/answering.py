"""The one path that every answer takes, whatever protocol asked for it.

    check -> place in the queue -> generate on a replica -> record

REST (OpenAI), Open Inference Protocol and native gRPC only translate to `Question` and from `Answer`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

from services.gateway.admission import Admission
from services.gateway.backends.pool import ReplicaPool
from services.gateway.config import GatewayConfig
from services.gateway.errors import BadRequestError
from steersman.errors import DeadlineError, InternalError, NotFoundError
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, by whom it does not matter here."""

    model: str
    request: PolicyServiceChatRequest
    """Messages or prompt, sampling; zero values mean 'not said'."""
    id_prefix: str = "chatcmpl"


@dataclass(slots=True, eq=False)
class Choice:
    """One choice of an answer, as far as it has been streamed."""

    text: list[str] = field(default_factory=list)
    tool_calls: list[common_pb2.ToolCall] = field(default_factory=list)
    finish_reason: int = 0
    tokens: int = 0


class Answer:
    """An answer that is being streamed. Iterate it, and close it in any case."""

    def __init__(self, answer_id: str, model: str, stream: AsyncGenerator[PolicyServiceChatResponse, None]) -> None:
        self.id = answer_id
        self.model = model
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.prompt_tokens = 0
        self.weights_version = 0
        self._stream = stream
        self._first: PolicyServiceChatResponse | None = None

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    async def open(self) -> None:
        """Waits for the first response, so that errors before it can still change the status."""
        try:
            self._first = await anext(self._stream)
        except StopAsyncIteration:
            raise InternalError("The policy service ended the answer before its first token; try again") from None
        except BaseException:
            await self.close()
            raise

    async def __aiter__(self) -> AsyncIterator[PolicyServiceChatResponse]:
        if self._first is not None:
            first, self._first = self._first, None
            self._take(first)
            yield first
        async for response in self._stream:
            self._take(response)
            yield response

    async def close(self) -> None:
        """Stops the generation where it is still running."""
        await self._stream.aclose()

    def _take(self, response: PolicyServiceChatResponse) -> None:
        while len(self.choices) <= response.choice_index:
            self.choices.append(Choice())
        choice = self.choices[response.choice_index]
        if response.delta:
            choice.text.append(response.delta)
        if response.tool_calls:
            choice.tool_calls.extend(response.tool_calls)
        choice.finish_reason = response.finish_reason or choice.finish_reason
        choice.tokens = response.completion_tokens or choice.tokens
        self.prompt_tokens = response.prompt_tokens or self.prompt_tokens
        self.weights_version = response.weights_version or self.weights_version


class Assistant:
    """Answers questions."""

    def __init__(self, config: GatewayConfig, pool: ReplicaPool) -> None:
        self.config = config
        self.pool = pool
        limits = config.limits
        self.admission = Admission(limits.concurrent_answers, limits.queued_answers, limits.queue_seconds)
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether an answer can be given."""
        return self.pool.ready and not self.draining

    async def answer(self, question: Question) -> Answer:
        """Returns when the first token is there.

        Raises:
            BadRequestError: the question breaks a limit.
            NotFoundError: there is no such model.
            RateLimitedError: too many are asking.
            UnavailableError: no replica can answer.
        """
        self.check(question)
        answer_id = f"{question.id_prefix}-{secrets.token_hex(12)}"
        answer = Answer(answer_id, question.model or self.config.model, self._generate(question.request))
        await answer.open()
        return answer

    def check(self, question: Question) -> None:
        """Refuses what breaks a limit and fills in the defaults."""
        config, limits, request = self.config, self.config.limits, question.request
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
        chars = len(request.prompt) + sum(len(message.content) for message in request.messages)
        if chars > limits.message_chars:
            raise BadRequestError(
                f"The text has {chars} characters, the limit is {limits.message_chars}; shorten it",
                param="messages",
                code="context_length_exceeded",
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
        prompt = config.defaults.system_prompt
        if prompt and request.messages and request.messages[0].role != "system":
            messages = [common_pb2.Message(role="system", content=prompt), *request.messages]
            del request.messages[:]
            request.messages.extend(messages)

    async def _generate(self, request: PolicyServiceChatRequest) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        seconds = self.config.limits.answer_seconds
        async with self.admission.place():
            stream = self.pool.stream(request, seconds)
            try:
                async for response in stream:
                    yield response
            except DeadlineError:
                raise DeadlineError(f"The answer took longer than {seconds:g} s; ask for fewer tokens") from None
            finally:
                await stream.aclose()
