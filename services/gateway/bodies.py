"""Reading JSON bodies of requests."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from services.gateway.errors import UnsupportedMediaTypeError, from_validation

B = TypeVar("B", bound=BaseModel)


async def read_body(request: Request, cls: type[B]) -> B:
    """Parses a JSON body; BadRequestError names the field that is wrong."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaTypeError("The body must be JSON; send content-type: application/json")
    try:
        return cls.model_validate_json(await request.body())
    except ValidationError as error:
        raise from_validation(error) from None
