"""The completions of a text, whole and as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from services.gateway.answer import Answer, Question
from services.gateway.answering import Assistant
from services.gateway.errors import BadRequestError
from services.gateway.openai.objects import TextChoice, TextCompletion, Usage, about, text_completion, usage
from services.gateway.openai.schema import CompletionRequest
from services.gateway.openai.stream import DONE, collect, event
from services.gateway.openai.text_logprobs import TextLogprobs, TextTokens
from steersman.rpc.finish import openai_finish_name
from steersman.v1.policy_pb2 import PolicyServiceChatResponse, TokenLogprob

_PROMPTS_AT_ONCE = 4


async def completion_object(
    assistant: Assistant, questions: Sequence[Question], body: CompletionRequest
) -> TextCompletion:
    """One answer a prompt, read as soon as it begins: a few at a time, so that a batch waits for places that it holds
    neither itself nor keeps from others. When one fails, none goes on."""
    found: list[dict[int, TextTokens]] = [{} for _ in questions]
    places = asyncio.Semaphore(min(_PROMPTS_AT_ONCE, assistant.config.limits.concurrent_answers))

    async def ask(question: Question, tokens: dict[int, TextTokens]) -> Answer:
        async with places:
            answer = await assistant.answer(question)

            def take(index: int, some: Sequence[TokenLogprob], of_prompt: bool) -> None:
                if index not in tokens:
                    tokens[index] = TextTokens(_echo(answer, body))
                choice = tokens[index]
                if of_prompt:
                    choice.keep(choice.of_prompt(some)[1])
                elif body.max_tokens != 0:
                    choice.keep(choice.generated(some)[1])

            await collect(answer, None if body.logprobs is None else take)
        _must_be_scored(body, tokens.get(0))
        return answer

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(*each)) for each in zip(questions, found, strict=True)]
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
    answers = [task.result() for task in tasks]
    choices: list[TextChoice] = []
    for answer, tokens in zip(answers, found, strict=True):
        for index, choice in enumerate(answer.choices):
            continuation, reason = _said(body, choice.text, choice.finish_reason)
            choices.append(
                {
                    "index": len(choices),
                    "text": _echo(answer, body) + continuation,
                    "logprobs": None if body.logprobs is None else tokens.get(index, TextTokens("")).whole(),
                    "finish_reason": reason or "stop",
                }
            )
    return {**text_completion(answers[0], choices), "usage": _usage(body, answers), "steersman": about(answers[0])}


async def completion_events(answer: Answer, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    choices: dict[int, TextTokens] = {}
    async with contextlib.aclosing(aiter(answer)) as responses:
        async for response in responses:
            if response.choice_index not in choices:
                choices[response.choice_index] = TextTokens(_echo(answer, body))
            choice = choices[response.choice_index]
            if not response.prompt_logprobs:
                _must_be_scored(body, choice)
            text, logprobs = _piece(body, choice, response)
            continuation, reason = _said(body, response.delta, response.finish_reason)
            part: TextChoice = {
                "index": response.choice_index,
                "text": text + continuation,
                "logprobs": None if body.logprobs is None else logprobs,
                "finish_reason": reason,
            }
            chunk = text_completion(answer, [part])
            if with_usage:
                chunk["usage"] = None
            yield event(chunk)
    if with_usage:
        yield event({**text_completion(answer, []), "usage": _usage(body, [answer])})
    yield DONE


def _piece(
    body: CompletionRequest, choice: TextTokens, response: PolicyServiceChatResponse
) -> tuple[str, TextLogprobs]:
    """What a response of a stream adds to the echoed prompt, and its tokens."""
    if response.prompt_logprobs:
        return choice.of_prompt(response.prompt_logprobs)
    return choice.generated(() if body.max_tokens == 0 else response.tokens)


def _echo(answer: Answer, body: CompletionRequest) -> str:
    """The prompt, where it is to be given back.

    Raises:
        BadRequestError: it came as token ids, and the engine does not tell their text.
    """
    if not body.echo:
        return ""
    request = answer.question.request
    if request.prompt_token_ids and not answer.prompt_text:
        raise BadRequestError("echo: this engine does not tell the text of token ids; leave it out", param="echo")
    return request.prompt or answer.prompt_text


def _must_be_scored(body: CompletionRequest, choice: TextTokens | None) -> None:
    """Raises BadRequestError where an engine has passed over that it was asked for the prompt's tokens."""
    if body.scores_prompt and not (choice and choice.scored):
        raise BadRequestError(
            "echo with logprobs: there are no log-probabilities of this prompt; leave one of them out", param="echo"
        )


def _said(body: CompletionRequest, text: str, reason: int) -> tuple[str, str | None]:
    """What is given of a continuation, and why it ended; engines make a token where none is wanted."""
    name = openai_finish_name(reason)
    return ("", name and "length") if body.max_tokens == 0 else (text, name)


def _usage(body: CompletionRequest, answers: Sequence[Answer]) -> Usage:
    counted = usage(answers)
    if body.max_tokens == 0:
        counted["total_tokens"] -= counted["completion_tokens"]
        counted["completion_tokens"] = 0
    return counted
