"""The objects of one top-level JSON array, one at a time, going on behind a broken one where that can be told.

The kept streaming parsers (ijson, json-stream) stop at the first error; a data set with one broken row of a million is
worth reading on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import IO, Any

from steersman.data.opening import UNREADABLE

_CHUNK = 1 << 20
#: Behind which distance from the end of what was read an error may come from reading too little.
_EDGE = 16


def exact_integer(digits: str) -> int | str:
    """An integer that 64 bits hold; a longer one as its text, which loses nothing."""
    if len(digits) < 21 and -(2**63) <= (value := int(digits)) < 2**64:
        return value
    return digits


def exact_decimal(digits: str) -> float | str:
    """A number that a double gives back as it was written; any other as its text."""
    value = float(digits)
    return value if Decimal(repr(value)) == Decimal(digits) else digits


def _refuse(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is no JSON value", "", 0)


def loads_exactly(text: str | bytes) -> Any:
    """JSON with numbers that 64 bits cannot hold as text. Raises ValueError."""
    return json.loads(text, parse_int=exact_integer, parse_float=exact_decimal, parse_constant=_refuse)


@dataclass(frozen=True, slots=True)
class Broken:
    """A part of the array that cannot be read."""

    line: int
    reason: str
    last: bool
    """Nothing behind it can be read either: the file was cut off or is damaged."""


def objects(text: IO[str], buffer: str, longest: int) -> Iterator[tuple[int, Any]]:
    """(line, value or `Broken`) of each element.

    Args:
        text: Where to read on.
        buffer: What was read of it already, beginning with the bracket or white space before it.
        longest: Characters of an element after which it is taken for broken.
    """
    decoder = json.JSONDecoder(parse_int=exact_integer, parse_float=exact_decimal, parse_constant=_refuse)
    at = counted = buffer.index("[") + 1
    line = 1 + buffer.count("\n", 0, at)
    more = True
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        line, counted = line + buffer.count("\n", counted, at), at
        if buffer.startswith("]", at):
            return
        try:
            data, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            # Cut by the end of the chunk, or broken? Only what fails near the end can be mended by reading on.
            reason, failed = (error.msg, error.pos) if isinstance(error, json.JSONDecodeError) else (str(error), at)
            failed = max(failed, at)
            cut = reason.startswith("Unterminated string") or failed >= len(buffer) - _EDGE
            if more and cut and len(buffer) - at < longest:
                try:
                    chunk = text.read(max(_CHUNK, len(buffer) - at))
                except UNREADABLE as damage:
                    yield line, Broken(line, f"damaged file ({damage}); fetch it again", True)
                    return
                more = bool(chunk)
                buffer, at, counted = buffer[at:] + chunk, 0, 0
                continue
            bad = line + buffer.count("\n", at, failed)
            reason = f"not valid JSON ({reason}); mend or remove the row"
            if not buffer[at:].strip():
                reason = "the array has no closing bracket; the file was cut off, fetch it again"
            at = _next_object(buffer, failed)
            yield line, Broken(bad, reason, at < 0)
            if at < 0:
                return
            continue
        yield line, data
        at = end


def _next_object(buffer: str, at: int) -> int:
    """Where the next object of the array seems to begin behind a broken one, or -1."""
    while (comma := buffer.find(",", at)) >= 0:
        at = comma + 1
        behind = buffer[at : at + 64].lstrip()
        before = buffer[max(0, comma - 64) : comma].rstrip()
        if behind[:1] == "{" and before[-1:] in ("}", "]", '"') and "\n" in buffer[at : at + 64]:
            return at
    return -1
