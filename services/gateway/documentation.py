"""What the OpenAPI document says of every route: bodies, and the errors that may come."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.gateway.errors import ErrorResponse

_ERRORS = {
    400: "A field is wrong; `error.param` names it.",
    401: "The key or token is missing or not valid.",
    403: "The key lacks the scope.",
    404: "There is no such thing here, or it belongs to somebody else.",
    408: "The body came too slowly.",
    409: "The idempotency key is in use for another or a running request.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests; wait for `retry-after` seconds.",
    500: "An error of the gateway; its log has the cause under the request id.",
    503: "No model can answer at the moment.",
    504: "The answer took too long.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documents error answers, for a route's `responses`; they refer to `error_schemas`.

    By reference, because FastAPI makes a validator of each model, which was most of the time to build the application.
    """
    schema = {"$ref": f"#/components/schemas/{ErrorResponse.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def error_schemas() -> dict[str, Any]:
    """The component schemas that `error_responses` refer to."""
    _, document = models_json_schema([(ErrorResponse, "serialization")], ref_template="#/components/schemas/{model}")
    return dict(document["$defs"])


POST_ERRORS = error_responses(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504)
GET_ERRORS = error_responses(401, 403, 404, 429, 500)


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Documents a body that the handler reads itself."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def definitions(*models: type[BaseModel]) -> dict[str, Any]:
    """The component schemas that the schemas of models refer to."""
    found: dict[str, Any] = {}
    for model in models:
        found.update(model.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {}))
    return found
