"""OpenAI's embeddings: the models that `embeddings` of the configuration names."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.callers import Caller
from services.gateway.backends.embeddings import EmbeddingPool, Embeddings
from services.gateway.bodies import fingerprint_of, json_response, plain_headers, read_body
from services.gateway.errors import BadRequestError
from services.gateway.idempotency import Claim
from services.gateway.openai.documentation import embeddings_doc
from services.gateway.openai.schema import Ignored, Name, PromptToken, Text, Wire
from services.gateway.openai.stream import until_disconnect
from services.gateway.quotas import Reserved
from services.gateway.recorder import Record, audit_row
from steersman.errors import NotFoundError, SteersmanError, UnavailableError

_MOST_TOKENS = 20_000
Tokens = Annotated[list[PromptToken], Field(fail_fast=True, min_length=1, max_length=_MOST_TOKENS)]
NonEmpty = Annotated[Text, Field(min_length=1)]


class EmbeddingRequest(Wire):
    model: Name
    """A name of the configuration's `embeddings`."""
    input: (
        NonEmpty
        | Tokens
        | Annotated[list[NonEmpty], Field(fail_fast=True, min_length=1, max_length=2048)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=2048)]
    )
    """A text, or its token ids in the model's vocabulary; or several of one kind."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of little-endian float32."""
    dimensions: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Only the first components."""
    user: Ignored | None = None
    """Accepted, without effect."""

    @property
    def inputs(self) -> list[str | list[int]]:
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


EMBEDDINGS_DOC = embeddings_doc(EmbeddingRequest)


def embeddings_router(assistant: Assistant, auth: Authenticator, prefix: str) -> APIRouter:
    router = APIRouter(prefix=prefix, tags=["OpenAI"])

    @router.post("/embeddings", **EMBEDDINGS_DOC)
    async def create_embeddings(request: Request) -> Response:
        headers = plain_headers(request)
        caller = await auth.caller(headers)
        body = await read_body(request, EmbeddingRequest)
        caller.require("chat")
        work = _embedded(assistant, caller, body, request.state.request_id, headers)
        found = await until_disconnect(request.receive, work)
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        data = [_object(index, vector, body.encoding_format) for index, vector in enumerate(found.vectors)]
        sent = {"object": "list", "data": data, "model": body.model, "usage": usage}
        return json_response(sent)

    return router


async def _embedded(
    assistant: Assistant, caller: Caller, body: EmbeddingRequest, request_id: str, headers: Mapping[str, str]
) -> Embeddings:
    """Counted against the key's quotas and recorded as answers are; a request with the same idempotency key is
    computed again, for vectors are not kept, and costs nothing."""
    pool = _pool(assistant, body)
    chars = sum(map(len, body.inputs))
    if chars > assistant.config.limits.message_chars:
        raise BadRequestError(
            f"The input has {chars} characters or tokens, the limit is {assistant.config.limits.message_chars}; "
            "send it in several requests",
            param="input",
        )
    if not assistant.can_record:
        raise UnavailableError("The gateway's database cannot be reached; try again later")
    claim: Claim | None = None
    repeated = False
    if key := headers.get("idempotency-key", ""):
        got = await assistant.idempotency.claim(caller, "embd-", key, fingerprint_of(body))
        claim, repeated = (got, False) if isinstance(got, Claim) else (None, True)
    reserved: Reserved | None = None
    found, outcome = None, "cancelled"
    try:
        if not repeated:
            reserved = await assistant.quotas.reserve(caller, chars // 4 + 1)
        async with assistant.admission.place():
            found = await pool.embed(body.inputs, body.dimensions or 0)
        outcome = "stop"
        return found
    except SteersmanError as error:
        outcome = type(error).__name__
        raise
    finally:
        tokens = found.tokens if found else 0
        action = "replay" if repeated else "embed"
        stored = assistant.recorder.put(
            Record(
                audit_row(caller, request_id, action, outcome, prompt_tokens=tokens),
                claim=claim,
                result={"tokens": tokens} if found else None,
                reserved=reserved,
                spent_tokens=tokens,
            )
        )
        if found:
            await stored


def _pool(assistant: Assistant, body: EmbeddingRequest) -> EmbeddingPool:
    pool = assistant.embeddings.get(body.model)
    if pool is None:
        names = ", ".join(assistant.embeddings)
        mend = f"use {names}" if names else "the configuration's embeddings name none"
        raise NotFoundError(
            f"The model '{body.model}' gives no embeddings here; {mend}",
            details={"param": "model", "code": "model_not_found"},
        )
    return pool


def _object(index: int, vector: np.ndarray, encoding: str | None) -> dict[str, Any]:
    value: Any = np.ascontiguousarray(vector, dtype="<f4")
    if encoding == "base64":
        value = base64.b64encode(value.tobytes()).decode()
    return {"object": "embedding", "index": index, "embedding": value}
