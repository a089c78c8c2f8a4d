"""OpenAI's routes: /v1/chat/completions, /v1/completions, /v1/models, also under /openai/v1."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from services.gateway.answer import Answer, Question
from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.bodies import plain_headers, read_body
from services.gateway.errors import BadRequestError
from services.gateway.openai.documentation import CHAT_DOC, COMPLETIONS_DOC, MODEL_DOC, MODELS_DOC
from services.gateway.openai.schema import ChatCompletionRequest, CompletionRequest
from services.gateway.openai.stream import DONE, EventStream, event, until_disconnect
from services.gateway.openai.translate import (
    FINISH_REASONS,
    chat_logprobs,
    chat_request,
    completion_logprobs,
    completion_request,
    fingerprint,
    tool_calls,
    usage,
)
from steersman.errors import NotFoundError
from steersman.v1.policy_pb2 import TokenLogprob


def openai_router(assistant: Assistant, auth: Authenticator, prefix: str) -> APIRouter:
    router = APIRouter(prefix=prefix, tags=["OpenAI"])

    @router.post("/chat/completions", **CHAT_DOC)
    async def create_chat_completion(request: Request) -> Response:
        headers = plain_headers(request)
        caller = await auth.caller(headers)
        body = await read_body(request, ChatCompletionRequest)
        question = Question(
            caller,
            request.state.request_id,
            chat_request(body),
            model=body.model,
            conversation_id=body.conversation_id or "",
            idempotency_key=headers.get("idempotency-key", ""),
            traceparent=headers.get("traceparent", ""),
            must_call=body.must_call,
        )
        if body.stream:
            answer = await until_disconnect(request.receive, assistant.answer(question))
            return EventStream(_chat_events(answer, body), answer.close)

        async def whole() -> dict[str, Any]:
            return await _chat_object(await assistant.answer(question), bool(body.logprobs))

        return _json(await until_disconnect(request.receive, whole()))

    @router.post("/completions", **COMPLETIONS_DOC)
    async def create_completion(request: Request) -> Response:
        caller = await auth.caller(request.headers)
        body = await read_body(request, CompletionRequest)
        if body.stream and len(body.prompts) > 1:
            raise BadRequestError("a stream continues one prompt; send several without stream", param="prompt")
        questions = [
            Question(
                caller,
                request.state.request_id,
                completion_request(body, prompt),
                model=body.model,
                id_prefix="cmpl",
                idempotency_key=_numbered(request.headers.get("idempotency-key", ""), index),
            )
            for index, prompt in enumerate(body.prompts)
        ]
        answers = await until_disconnect(request.receive, _answer_all(assistant, questions))
        if body.stream:
            return EventStream(_completion_events(answers[0], body), answers[0].close)
        return _json(await until_disconnect(request.receive, _completion_object(answers, body)))

    @router.get("/models", **MODELS_DOC)
    async def list_models(request: Request) -> Response:
        await auth.caller(request.headers)
        return _json({"object": "list", "data": [_model(name) for name in assistant.config.model_names]})

    @router.get("/models/{model}", **MODEL_DOC)
    async def retrieve_model(request: Request, model: str) -> Response:
        await auth.caller(request.headers)
        if model not in assistant.config.model_names:
            raise NotFoundError(
                f"The model '{model}' does not exist here; use '{assistant.config.model}'",
                details={"param": "model", "code": "model_not_found"},
            )
        return _json(_model(model))

    return router


def _json(data: Any) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "steersman"}


def _about(answer: Answer) -> dict[str, Any]:
    """Our extension of OpenAI's objects."""
    return {
        "answer_id": answer.id,
        "feedback_token": answer.feedback_token,
        "weights_version": answer.weights_version,
        "sources": [source.as_json() for source in answer.sources],
        "unsourced": answer.unsourced,
        "proposed_actions": [proposal.as_json() for proposal in answer.proposals],
    }


async def _collect(answer: Answer, tokens: dict[int, list[TokenLogprob]] | None) -> None:
    """Reads the answer to its end; `tokens` receives the tokens of every choice."""
    try:
        async for response in answer:
            if tokens is not None:
                tokens.setdefault(response.choice_index, []).extend(response.tokens)
    finally:
        await answer.close()


async def _chat_object(answer: Answer, logprobs: bool) -> dict[str, Any]:
    tokens: dict[int, list[TokenLogprob]] = {}
    await _collect(answer, tokens if logprobs else None)
    choices = []
    for index, choice in enumerate(answer.choices):
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tool_calls:
            message["tool_calls"] = tool_calls(choice.tool_calls, indexed=False)
            message["content"] = message["content"] or None
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(tokens.get(index, ())) if logprobs else None,
                "finish_reason": FINISH_REASONS.get(choice.finish_reason, "stop"),
            }
        )
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
        "usage": usage(answer),
        "system_fingerprint": fingerprint(answer),
        "steersman": _about(answer),
    }


async def _chat_events(answer: Answer, body: ChatCompletionRequest) -> AsyncGenerator[bytes, None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head: dict[str, Any] = {
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": answer.model,
    }
    tail: dict[str, Any] = {"usage": None} if with_usage else {}
    begun: set[int] = set()
    async with contextlib.aclosing(aiter(answer)) as responses:
        async for response in responses:
            index = response.choice_index
            delta: dict[str, Any] = {}
            if index not in begun:
                begun.add(index)
                delta = {"role": "assistant", "content": "", "refusal": None}
            if response.delta:
                delta["content"] = response.delta
            if response.tool_calls:
                delta["tool_calls"] = tool_calls(response.tool_calls, indexed=True)
            finish = FINISH_REASONS.get(response.finish_reason)
            if not delta and finish is None and not (body.logprobs and response.tokens):
                continue
            choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
            if body.logprobs:
                choice["logprobs"] = chat_logprobs(response.tokens)
            chunk = {**head, "system_fingerprint": fingerprint(answer), "choices": [choice], **tail}
            if finish is not None:
                chunk["steersman"] = _about(answer)
            yield event(chunk)
    if with_usage:
        yield event({**head, "system_fingerprint": fingerprint(answer), "choices": [], "usage": usage(answer)})
    yield DONE


def _numbered(key: str, index: int) -> str:
    return f"{key}#{index}" if key and index else key


async def _answer_all(assistant: Assistant, questions: Sequence[Question]) -> list[Answer]:
    """One answer a prompt; when one fails, none goes on."""
    results = await asyncio.gather(*(assistant.answer(question) for question in questions), return_exceptions=True)
    failed = next((result for result in results if isinstance(result, BaseException)), None)
    answers = [result for result in results if isinstance(result, Answer)]
    if failed is not None:
        await asyncio.gather(*(answer.close() for answer in answers))
        raise failed
    return answers


async def _completion_object(answers: Sequence[Answer], body: CompletionRequest) -> dict[str, Any]:
    per_answer: list[dict[int, list[TokenLogprob]]] = [{} for _ in answers]
    with_logprobs = body.logprobs is not None
    await asyncio.gather(
        *(
            _collect(answer, tokens if with_logprobs else None)
            for answer, tokens in zip(answers, per_answer, strict=True)
        )
    )
    choices: list[dict[str, Any]] = []
    for answer, tokens in zip(answers, per_answer, strict=True):
        for index, choice in enumerate(answer.choices):
            choices.append(
                {
                    "index": len(choices),
                    "text": choice.text,
                    "logprobs": completion_logprobs(tokens.get(index, ()), 0) if with_logprobs else None,
                    "finish_reason": FINISH_REASONS.get(choice.finish_reason, "stop"),
                }
            )
    counts = [usage(answer) for answer in answers]
    return {
        "id": answers[0].id,
        "object": "text_completion",
        "created": answers[0].created,
        "model": answers[0].model,
        "choices": choices,
        "usage": {key: sum(count[key] for count in counts) for key in counts[0]},
        "system_fingerprint": fingerprint(answers[0]),
        "steersman": _about(answers[0]),
    }


async def _completion_events(answer: Answer, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head: dict[str, Any] = {
        "id": answer.id,
        "object": "text_completion",
        "created": answer.created,
        "model": answer.model,
    }
    offsets: dict[int, int] = {}
    async with contextlib.aclosing(aiter(answer)) as responses:
        async for response in responses:
            index, finish = response.choice_index, FINISH_REASONS.get(response.finish_reason)
            choice: dict[str, Any] = {"index": index, "text": response.delta, "logprobs": None, "finish_reason": finish}
            if body.logprobs is not None:
                choice["logprobs"] = completion_logprobs(response.tokens, offsets.get(index, 0))
                offsets[index] = offsets.get(index, 0) + len(response.delta)
            chunk: dict[str, Any] = {**head, "system_fingerprint": fingerprint(answer), "choices": [choice]}
            if with_usage:
                chunk["usage"] = None
            yield event(chunk)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(answer)})
    yield DONE
