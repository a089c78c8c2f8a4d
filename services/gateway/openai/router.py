"""OpenAI's routes: /v1/chat/completions, /v1/completions, /v1/models, also under /openai/v1."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from services.gateway.answer import Answer, Question
from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.bodies import consent_of, fingerprint_of, json_response, plain_headers, read_body
from services.gateway.errors import BadRequestError
from services.gateway.openai.completions import completion_events, completion_object
from services.gateway.openai.documentation import CHAT_DOC, COMPLETIONS_DOC, MODEL_DOC, MODELS_DOC
from services.gateway.openai.objects import (
    ChatCompletion,
    TokenInfo,
    about,
    chat_choice,
    chat_chunk,
    chat_completion,
    token_infos,
    usage,
)
from services.gateway.openai.schema import ChatCompletionRequest, CompletionRequest
from services.gateway.openai.stream import DONE, EventStream, collect, event, until_disconnect
from services.gateway.openai.translate import chat_request, completion_request


def openai_router(assistant: Assistant, auth: Authenticator, prefix: str) -> APIRouter:
    router = APIRouter(prefix=prefix, tags=["OpenAI"])
    names = (*assistant.models.names, *assistant.embeddings)

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
            fingerprint=fingerprint_of(body),
            consent=consent_of(headers, body.consent),
            traceparent=headers.get("traceparent", ""),
            variant=headers.get("x-steersman-variant", ""),
            must_call=body.must_call,
            single_call=body.parallel_tool_calls is False,
        )
        if body.stream:
            answer = await until_disconnect(request.receive, assistant.answer(question))
            return EventStream(_chat_events(answer, body), answer.close)

        async def whole() -> ChatCompletion:
            return await _chat_object(await assistant.answer(question), bool(body.logprobs))

        return json_response(await until_disconnect(request.receive, whole()))

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
                id_prefix="cmpl-",
                idempotency_key=_numbered(request.headers.get("idempotency-key", ""), index),
                fingerprint=fingerprint_of(body),
                consent=consent_of(request.headers, body.consent),
            )
            for index, prompt in enumerate(body.prompts)
        ]
        if body.stream:
            answer = await until_disconnect(request.receive, assistant.answer(questions[0]))
            return EventStream(completion_events(answer, body), answer.close)
        return json_response(await until_disconnect(request.receive, completion_object(assistant, questions, body)))

    @router.get("/models", **MODELS_DOC)
    async def list_models(request: Request) -> Response:
        await auth.caller(request.headers)
        return json_response({"object": "list", "data": [_model(name) for name in names]})

    @router.get("/models/{model:path}", **MODEL_DOC)
    async def retrieve_model(request: Request, model: str) -> Response:
        await auth.caller(request.headers)
        if model not in assistant.embeddings:
            assistant.models.check(model)
        return json_response(_model(model))

    return router


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "steersman"}


async def _chat_object(answer: Answer, logprobs: bool) -> ChatCompletion:
    if not logprobs:
        await collect(answer)
        return chat_completion(answer, None)
    found: dict[int, list[TokenInfo]] = {}
    await collect(answer, lambda index, tokens, _: found.setdefault(index, []).extend(token_infos(tokens)))
    return chat_completion(answer, found)


async def _chat_events(answer: Answer, body: ChatCompletionRequest) -> AsyncGenerator[bytes, None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    begun: set[int] = set()
    async with contextlib.aclosing(aiter(answer)) as responses:
        async for response in responses:
            first = response.choice_index not in begun
            choice = chat_choice(response, first=first, logprobs=bool(body.logprobs))
            if choice is None:
                continue
            begun.add(response.choice_index)
            chunk = chat_chunk(answer, [choice])
            if with_usage:
                chunk["usage"] = None
            if choice["finish_reason"] is not None:
                chunk["steersman"] = about(answer)
            yield event(chunk)
    if with_usage:
        yield event({**chat_chunk(answer, []), "usage": usage([answer])})
    yield DONE


def _numbered(key: str, index: int) -> str:
    return f"{key}#{index}" if key and index else key
