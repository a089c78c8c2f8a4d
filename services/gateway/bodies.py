"""Reading JSON bodies of requests."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from services.gateway.errors import UnsupportedMediaTypeError, from_validation

B = TypeVar("B", bound=BaseModel)


def plain_headers(request: Request) -> dict[str, str]:
    """The headers as a dictionary: several look-ups in it cost less than one in the request's own."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}


async def read_body(request: Request, cls: type[B]) -> B:
    """Parses a JSON body; BadRequestError names the field that is wrong."""
    media_type = request.headers.get("content-type", "")
    if media_type != "application/json" and media_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaTypeError("The body must be JSON; send content-type: application/json")
    try:
        return cls.model_validate_json(await request.body())
    except ValidationError as error:
        raise from_validation(error) from None
