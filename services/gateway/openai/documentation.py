"""What the OpenAPI document says about OpenAI's routes: every status that they answer with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from services.gateway.documentation import GET_ERRORS, POST_ERRORS, error_responses, json_body
from services.gateway.openai.responses_schema import ResponsesRequest
from services.gateway.openai.schema import ChatCompletionRequest, CompletionRequest

BODIES = (ChatCompletionRequest, CompletionRequest, ResponsesRequest)

_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` server-sent events that end with `data: [DONE]`.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {},
        },
    }
}
_OBJECT: dict[int | str, dict[str, Any]] = {
    200: {"description": "As in OpenAI's API.", "content": {"application/json": {"schema": {"type": "object"}}}}
}

CHAT_DOC: dict[str, Any] = {
    "summary": "Answer a conversation",
    "openapi_extra": json_body(ChatCompletionRequest),
    "responses": {**_ANSWER, **POST_ERRORS},
}
COMPLETIONS_DOC: dict[str, Any] = {
    "summary": "Continue a text",
    "openapi_extra": json_body(CompletionRequest),
    "responses": {**_ANSWER, **POST_ERRORS},
}
MODELS_DOC: dict[str, Any] = {"summary": "List the models", "responses": {**_OBJECT, **GET_ERRORS}}
MODEL_DOC: dict[str, Any] = {"summary": "Describe a model", "responses": {**_OBJECT, **GET_ERRORS}}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response; with `stream` its events, from `response.created` to `response.completed`.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}
RESPONSES_DOC: dict[str, Any] = {
    "summary": "Answer input items",
    "openapi_extra": json_body(ResponsesRequest),
    "responses": {**_EVENTS, **POST_ERRORS},
}
RESPONSE_DOC: dict[str, Any] = {
    "summary": "A stored response",
    "responses": {**_OBJECT, **GET_ERRORS, **error_responses(400, 503)},
}
INPUT_ITEMS_DOC: dict[str, Any] = {**RESPONSE_DOC, "summary": "What a stored response answers"}
RESPONSE_CANCEL_DOC: dict[str, Any] = {**RESPONSE_DOC, "summary": "Stop a response that is being streamed"}


def embeddings_doc(body: type[BaseModel]) -> dict[str, Any]:
    return {
        "summary": "Turn texts into vectors",
        "openapi_extra": json_body(body),
        "responses": {**_OBJECT, **POST_ERRORS},
    }
