"""The bounds that the contract gives the fields of a request (`proto/steersman/v1/bounds.proto`), checked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
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
    for path, what in _beyond(request, ""):
        raise InvalidArgumentError(f"{path} {what}")


@dataclass(frozen=True)
class _Field:
    name: str
    many: bool
    is_map: bool
    present: bool
    """It may be absent, and then has no value to look at."""
    bound: bounds_pb2.Bound
    rule: Callable[[Any], str] | None
    """What is wrong with one value; empty: nothing."""
    nested: bool
    """Its messages have fields with bounds themselves."""


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
        nested = message is not None and not is_map and bool(_fields(message))
        if nested or bound.ByteSize():
            rule = _rule(bound)
            found.append(_Field(field.name, field.is_repeated, is_map, field.has_presence, bound, rule, nested))
    return tuple(found)


def bound_of(field: FieldDescriptor) -> bounds_pb2.Bound:
    """That of the contract; empty where it has none."""
    options: Any = field.GetOptions()  # the generated stub does not say that `bound` is an extension
    bound: bounds_pb2.Bound = options.Extensions[bounds_pb2.bound]
    return bound


def _rule(bound: bounds_pb2.Bound) -> Callable[[Any], str] | None:
    if bound.characters:
        return lambda text: (
            f"has {len(text)} characters; it holds at most {bound.characters}" if len(text) > bound.characters else ""
        )
    if bound.HasField("least") or bound.HasField("most"):
        least = bound.least if bound.HasField("least") else -math.inf
        most = bound.most if bound.HasField("most") else math.inf
        ends = (f"at least {least:g}" if least > -math.inf else "", f"at most {most:g}" if most < math.inf else "")
        limits = " and ".join(filter(None, ends))
        return lambda number: "" if least <= number <= most else f"is {number:g}; it must be {limits}"
    return None


def _beyond(message: Message, prefix: str) -> Iterator[tuple[str, str]]:
    for field in _fields(message.DESCRIPTOR):
        if field.present and not message.HasField(field.name):
            continue
        path, value = prefix + field.name, getattr(message, field.name)
        if not field.many:
            yield from _of_one(field, path, value)
            continue
        if field.bound.entries and len(value) > field.bound.entries:
            yield path, f"has {len(value)} entries; it holds at most {field.bound.entries}"
            return
        if not field.nested and field.rule is None:
            continue
        for key, one in value.items() if field.is_map else enumerate(value):
            yield from _of_one(field, f"{path}[{key}]", one)


def _of_one(field: _Field, path: str, value: Any) -> Iterator[tuple[str, str]]:
    if field.nested:
        yield from _beyond(value, f"{path}.")
    elif field.rule is not None and (what := field.rule(value)):
        yield path, what
