"""Errors that only an HTTP endpoint has, and the shapes in which errors leave the gateway."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from steersman.errors import InvalidArgumentError, RateLimitedError, SteersmanError, UnauthenticatedError


class BadRequestError(InvalidArgumentError):
    """A field of a request is wrong; `param` names it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, details={"param": param, "code": code})


class TooLargeError(InvalidArgumentError):
    http_status = 413


class LongPathError(InvalidArgumentError):
    http_status = 414


class LargeHeadersError(InvalidArgumentError):
    http_status = 431


class SlowRequestError(InvalidArgumentError):
    http_status = 408


class UnsupportedMediaTypeError(InvalidArgumentError):
    http_status = 415


_SAYS = {
    "missing": "this field is missing; add it",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "none_required": "must be null; leave it out",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "must have as {discriminator} one of {expected_tags}",
    "union_tag_not_found": "must say its {discriminator}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_long": "has more than {max_length} entries; send fewer",
    "too_short": "needs at least {min_length} entries",
    "string_too_long": "has more than {max_length} characters; shorten it",
    "string_too_short": "needs at least {min_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
}
# What pydantic puts into a place beside names of fields: members of a union.
_UNION_MEMBER = re.compile(r"[A-Z]|.*\[|(?:str|int|float|bool|dict|constrained-str|function-\w+|literal)$")


def from_validation(error: ValidationError) -> BadRequestError:
    """The first problem of a request body as one sentence that names the field."""
    return from_problems(error.errors(include_url=False, include_input=False))


def from_problems(problems: Sequence[Any]) -> BadRequestError:
    """The first of pydantic's problems (`ErrorDetails`) as one sentence that names the field."""
    first = problems[0]
    if first["type"] == "json_invalid":
        message = first["msg"].removeprefix("Invalid JSON: ")
        return BadRequestError(f"The body is not valid JSON: {message}")
    place = _place(first)
    # A value that is none of a union's members, but nearly one: what is wrong in it says more than what it is not.
    while place and (deeper := next((p for p in map(_place, problems) if p.startswith(f"{place}.")), "")):
        place = deeper
    # A value that is none of a union's members has a problem with each.
    said = list(dict.fromkeys(_sentence(each) for each in problems if _place(each) == place))
    message = " or ".join([said[0], *(other.removeprefix("must be ") for other in said[1:])])
    return BadRequestError(f"{place or 'body'}: {message}", param=place or None)


def _sentence(problem: ErrorDetails) -> str:
    template = _SAYS.get(problem["type"])
    if template is not None:
        return template.format(**problem.get("ctx", {}))
    return problem["msg"].removeprefix("Value error, ")


def _place(problem: ErrorDetails) -> str:
    parts: list[str] = []
    for part in problem["loc"]:
        if isinstance(part, int) or not _UNION_MEMBER.match(part):
            # The tag of a discriminated union may be called as the field after it.
            parts += [] if parts[-1:] == [str(part)] and not isinstance(part, int) else [str(part)]
    if problem["type"] == "extra_forbidden":
        parts.append(problem.get("ctx", {}).get("name", ""))
    return ".".join(filter(None, parts))


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
            "param": error.details.get("param") or error.openai_param,
            "code": error.details.get("code") or error.openai_code,
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
