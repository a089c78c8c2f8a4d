"""Requests that carry a checksum of their own bytes, and what a server makes of those that arrive otherwise.

TCP lets one damaged segment in about 65,000 through, and a proxy may damage what it copies; TLS finds it, plain text
does not. A client of ours puts a field behind a request that no message declares: a `fixed32` with the CRC-32 of all
bytes before it. Who does not know it skips it, as protobuf says of unknown fields; a server of ours compares. The same
checksum goes ahead as metadata of the call: a bit of a frame's head is enough to bring it the message of another call
on the connection, which is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message
from isal import isal_zlib

from steersman.errors import ChecksumError, InvalidArgumentError, SteersmanError

CHECKSUM = "x-request-crc32"
"""Metadata: the checksum of the request of this call, in hexadecimal."""
_TAG = b"\xfd\xff\xff\xff\x0f"
"""Field 536,870,911, the last there can be, of wire type 5 (four bytes)."""
_SIZE = len(_TAG) + 4


@dataclass(frozen=True)
class Unreadable:
    """In the place of a request: why it is none."""

    error: SteersmanError


@dataclass(frozen=True)
class Arrived:
    """A request that could be read."""

    request: Any
    size: int
    """In bytes."""
    checksum: str | None
    """None: it came without."""


def sealed(request: Message) -> bytes:
    """The bytes of a request with their checksum behind them."""
    data = request.SerializeToString()
    return data + _TAG + isal_zlib.crc32(data).to_bytes(4, "little")


def checksum_of(data: bytes) -> str:
    """That of what `sealed` returned."""
    return data[-4:].hex()


def checked(method: str, parse: Callable[[bytes], Any]) -> Callable[[bytes], Arrived | Unreadable]:
    """A deserializer that raises nothing: `Unreadable` for bytes that are no request or do not have their checksum,
    else `Arrived`."""

    def read(data: bytes) -> Arrived | Unreadable:
        try:
            if data[-_SIZE:-4] != _TAG:
                return Arrived(parse(data), len(data), None)
            inner = data[:-_SIZE]
            if isal_zlib.crc32(inner) != int.from_bytes(data[-4:], "little"):
                return Unreadable(damaged(method))
            return Arrived(parse(inner), len(data), checksum_of(data))
        except DecodeError:
            return Unreadable(InvalidArgumentError(f"{method}: the bytes are no request of this method"))

    return read


def damaged(method: str) -> ChecksumError:
    return ChecksumError(f"{method}: the request was damaged on its way; send it again")
