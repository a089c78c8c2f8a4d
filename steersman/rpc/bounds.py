"""The bounds that the contract gives the fields of a request (`proto/steersman/v1/bounds.proto`), checked."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from steersman.errors import InvalidArgumentError
from steersman.v1 import bounds_pb2

_AT_ONCE_BYTES = 16_384
"""Requests up to this size are checked on the event loop; what larger ones hold takes longer than others may wait."""


async def check_request(request: Message, size: int) -> None:
    """As `check`, without holding up other calls; `size`: of the request in bytes."""
    if size > _AT_ONCE_BYTES:
        await asyncio.to_thread(check, request)
    else:
        check(request)


def check(request: Message) -> None:
    """Raises InvalidArgumentError for the first field beyond its bound."""
    try:
        _check(request, _fields(request.DESCRIPTOR))
    except _BeyondError as beyond:
        raise InvalidArgumentError(f"{beyond.path} {beyond.what}") from None


class _BeyondError(Exception):
    def __init__(self, what: str) -> None:
        self.what = what
        self.path = ""
        """Grows on the way out, so that a request within its bounds pays nothing for it."""


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    present: bool
    """It may be absent, and then has no value to look at."""
    many: bool
    is_map: bool
    inner: tuple[_Field, ...]
    """The fields of its messages that have something to check."""
    characters: int
    """0: it is no text."""
    entries: float
    least: float
    most: float


@cache
def _fields(descriptor: Descriptor) -> tuple[_Field, ...]:
    """The fields of a message that have something to check; none of somebody else's messages."""
    if descriptor.file.package != bounds_pb2.DESCRIPTOR.package:
        return ()
    found = []
    for field in descriptor.fields:
        bound = bound_of(field)
        message = field.message_type
        is_map = message is not None and message.GetOptions().map_entry
        inner = _fields(message) if message is not None and not is_map else ()
        if inner or bound.ByteSize():
            found.append(
                _Field(
                    field.name,
                    field.has_presence,
                    field.is_repeated,
                    is_map,
                    inner,
                    bound.characters,
                    bound.entries or math.inf,
                    bound.least if bound.HasField("least") else -math.inf,
                    bound.most if bound.HasField("most") else math.inf,
                )
            )
    return tuple(found)


def bound_of(field: FieldDescriptor) -> bounds_pb2.Bound:
    """That of the contract; empty where it has none."""
    options: Any = field.GetOptions()  # the generated stub does not say that `bound` is an extension
    bound: bounds_pb2.Bound = options.Extensions[bounds_pb2.bound]
    return bound


def _check(message: Message, fields: tuple[_Field, ...]) -> None:
    for field in fields:
        if field.present and not message.HasField(field.name):
            continue
        value, key = getattr(message, field.name), None
        try:
            if not field.many:
                _check_one(field, value)
                continue
            if len(value) > field.entries:
                raise _BeyondError(f"has {len(value)} entries; it holds at most {field.entries}")
            if field.inner or field.characters or field.most < math.inf:
                for key, one in value.items() if field.is_map else enumerate(value):  # noqa: B007 - it tells where
                    _check_one(field, one)
        except _BeyondError as beyond:
            place = "" if key is None else f"[{key}]"
            beyond.path = f"{field.name}{place}{'.' if beyond.path else ''}{beyond.path}"
            raise


def _check_one(field: _Field, value: Any) -> None:
    if field.inner:
        _check(value, field.inner)
    elif field.characters:
        if len(value) > field.characters:
            raise _BeyondError(f"has {len(value)} characters; it holds at most {field.characters}")
    elif not field.least <= value <= field.most:
        least = f"at least {field.least:g}" if field.least > -math.inf else ""
        most = f"at most {field.most:g}" if field.most < math.inf else ""
        raise _BeyondError(f"is {value:g}; it must be {' and '.join(filter(None, (least, most)))}")
