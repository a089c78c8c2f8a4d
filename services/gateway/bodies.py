"""JSON bodies: those of requests are read, those of answers are written."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from services.gateway.errors import BadRequestError, UnsupportedMediaTypeError, from_validation

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

B = TypeVar("B", bound=BaseModel)

_MOST_VALUES = 20_000


def plain_headers(request: Request) -> dict[str, str]:
    """The headers as a dictionary: several look-ups in it cost less than one in the request's own."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}


async def read_body(request: Request, cls: type[B]) -> B:
    """Parses a JSON body; BadRequestError names the field that is wrong."""
    media_type = request.headers.get("content-type", "")
    if media_type != "application/json" and media_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaTypeError("The body must be JSON; send content-type: application/json")
    body = await request.body()
    check_structure(body)
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


def json_response(data: Any, status: int = 200) -> Response:
    """An answer in JSON; arrays of numpy are lists in it."""
    return Response(orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type="application/json")


def check_structure(body: bytes) -> None:
    """Refuses JSON of very many values, however small, before anything is made of them.

    Linear, in C. Commas and brackets inside strings do not count; strings are only looked for where it matters.
    """
    if _values(body) <= _MOST_VALUES:
        return
    outside = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    if _values(b"".join(outside)) > _MOST_VALUES:
        raise BadRequestError(f"The body has more than {_MOST_VALUES} values; send less")


def _values(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def fingerprint_of(body: BaseModel) -> bytes:
    """All that a caller sent, in one form; how it is to be delivered is no part of it."""
    sent = body.model_dump(exclude_unset=True, exclude={"stream", "stream_options"}, by_alias=True)
    return json.dumps(sent, sort_keys=True).encode()


def consent_of(headers: Mapping[str, str], said: bool | None = None) -> bool | None:
    """Whether the end customer agreed to training on an answer: the body's word, or the header's `x-consent`.

    Raises BadRequestError for a header that is neither true nor false.
    """
    header = headers.get("x-consent")
    if said is not None or header is None:
        return said
    if header not in ("true", "false"):
        raise BadRequestError("x-consent must be true or false", param="x-consent")
    return header == "true"


def request_id_of(headers: Mapping[str, str]) -> str:
    """What the caller calls its request (`x-request-id`), or a new name."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
