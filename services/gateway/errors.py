"""Errors that only an HTTP endpoint has, and the shapes in which errors leave the gateway."""

from __future__ import annotations

import math
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from steersman.errors import InvalidArgumentError, RateLimitedError, SteersmanError, UnauthenticatedError


class BadRequestError(InvalidArgumentError):
    """A field of a request is wrong; `param` names it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, details={"param": param, "code": code})


class TooLargeError(InvalidArgumentError):
    http_status = 413


class LargeHeadersError(InvalidArgumentError):
    http_status = 431


class SlowRequestError(InvalidArgumentError):
    http_status = 408


class UnsupportedMediaTypeError(InvalidArgumentError):
    http_status = 415


def from_validation(error: ValidationError) -> BadRequestError:
    """The first problem of a request body as one sentence that names the field."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    location = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "this field is not known here; leave it out"
    elif problem["type"] == "missing":
        message = "this field is missing; add it"
    elif problem["type"] == "json_invalid":
        return BadRequestError(f"The body is not valid JSON: {message.removeprefix('Invalid JSON: ')}")
    return BadRequestError(f"{location or 'body'}: {message}", param=location or None)


class ErrorBody(BaseModel):
    message: str
    """One sentence: what is wrong and how to mend it."""
    type: str
    param: str | None
    """The field that is wrong."""
    code: str | None


class ErrorResponse(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorBody


def error_body(error: SteersmanError) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {
        "error": {
            "message": error.message,
            "type": error.openai_type,
            "param": error.details.get("param"),
            "code": error.details.get("code"),
        }
    }


def error_headers(error: SteersmanError) -> dict[str, str]:
    if isinstance(error, RateLimitedError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, UnauthenticatedError):
        return {"www-authenticate": "Bearer"}
    return {}


def error_response(error: SteersmanError, *, path: str = "") -> Response:
    """The HTTP answer: OpenAI's shape, and under /v2 the Open Inference Protocol's."""
    body: dict[str, Any] = {"error": error.message} if path.startswith("/v2") else error_body(error)
    return Response(orjson.dumps(body), error.http_status, headers=error_headers(error), media_type="application/json")
