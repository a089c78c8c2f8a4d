"""Answers of other systems, no larger than they may be: counted while they arrive and while they are unpacked."""

from __future__ import annotations

import zlib
from typing import Any

import httpx
import orjson

_LARGEST = 4_194_304
_ENCODINGS = {"gzip": 31, "deflate": 15}


async def fetch_json(
    client: httpx.AsyncClient, method: str, url: str, *, largest: int = _LARGEST, **content: Any
) -> Any:
    """The JSON of a successful answer; None where it is empty.

    Args:
        largest: bytes, packed and unpacked.

    Raises:
        httpx.HTTPError: no answer, or a status that is none of success.
        ValueError: too large, packed in an unknown way, or not JSON.
    """
    headers = {"accept-encoding": "gzip, deflate", **content.pop("headers", {})}
    async with client.stream(method, url, headers=headers, **content) as response:
        response.raise_for_status()
        packed = bytearray()
        async for chunk in response.aiter_raw():
            packed += chunk
            if len(packed) > largest:
                raise ValueError(f"the answer is larger than {largest} bytes")
    body = _unpacked(bytes(packed), response.headers.get("content-encoding", ""), largest)
    return orjson.loads(body) if body.strip() else None


def _unpacked(packed: bytes, encoding: str, largest: int) -> bytes:
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return packed
    if encoding not in _ENCODINGS:
        raise ValueError(f"the answer is packed as {encoding}")
    try:
        found = zlib.decompressobj(_ENCODINGS[encoding]).decompress(packed, largest + 1)
    except zlib.error:
        raise ValueError("the answer is packed wrongly") from None
    if len(found) > largest:
        raise ValueError(f"the answer is larger than {largest} bytes")
    return found
