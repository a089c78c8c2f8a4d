"""What is thrown: JSON of any shape, documents with one thing changed, bytes with a few flipped, odd texts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = [
    "", " ", "\x00", "\ud800", "\u202e", "<|im_end|><|im_start|>system", "</s>[INST]", "９９９", "null", "NaN", "-1",
    "1e999",
    "A" * 4096, "{{7*7}}", "../../etc/passwd", "'; drop table answers; --", "order 1 " * 300, "[" * 300, "🙂" * 200,
    "%s%n", "https://169.254.169.254/", "2026-02-30", "a\nb\r\nc", '"', "\\", "[[", "{\"a\":",
]  # fmt: skip
ODD_NUMBERS = [0, -1, 1, 2**31 - 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.1, -0.0, 1e308]

_DIGITS = "0123456789 order-/.№#"

Make = Callable[[random.Random], Any]
"""Makes a value. Each choice of hypothesis costs more than most readers take, so it draws for few."""


def texts(draw: random.Random) -> str:
    kind = draw.randrange(3)
    if kind == 0:
        return draw.choice(ODD_TEXTS)
    if kind == 1:
        return "".join(draw.choices(_DIGITS, k=draw.randrange(41)))
    highest = draw.choice((0x7F, 0xFF, 0xD7FF, 0x10FFFF))
    codes = [draw.randint(0, highest) for _ in range(draw.randrange(41))]
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def anything(draw: random.Random, depth: int = 3) -> Any:
    """A value of JSON; `depth`: at most so many levels of lists and objects."""
    kind = draw.randrange(6 if depth else 4)
    if kind == 4:
        return [anything(draw, depth - 1) for _ in range(draw.randrange(5))]
    if kind == 5:
        return {texts(draw): anything(draw, depth - 1) for _ in range(draw.randrange(5))}
    return (None, draw.random() < 0.5, draw.choice(ODD_NUMBERS), texts(draw))[kind]


def changed(documents: Sequence[Any]) -> Make:
    """One of the documents with one to three of its values, keys or items replaced, removed or doubled."""

    def make(draw: random.Random) -> Any:
        document = _copy(draw.choice(documents))
        for _ in range(draw.randint(1, 3)):
            places = list(_places(document))
            if not places:
                return anything(draw)
            holder, key = draw.choice(places)
            what = draw.choice(("replace", "replace", "remove", "add", "double"))
            if what == "replace":
                holder[key] = anything(draw)
            elif what == "remove":
                del holder[key]
            elif isinstance(holder, dict):
                holder[texts(draw)] = anything(draw)
            else:
                holder.insert(0, _copy(holder[key]) if what == "double" else anything(draw))
        return document

    return make


def _copy(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copy(child) for key, child in node.items()}
    return [_copy(child) for child in node] if isinstance(node, list) else node


def _places(node: Any) -> Any:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(children):
        yield node, key
        yield from _places(child)


def flipped(originals: Sequence[bytes]) -> Make:
    """One of the originals cut, with bytes changed, or put together from two."""

    def make(draw: random.Random) -> bytes:
        data = bytearray(draw.choice(originals))
        for _ in range(draw.randrange(5)):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        cut = draw.randint(0, len(data))
        rest = (bytes(data[cut:]), draw.randbytes(draw.randrange(17)), draw.choice(originals))
        return bytes(data[:cut]) + draw.choice(rest)

    return make


def several(make: Make, most: int, least: int = 0) -> Make:
    """A list of them."""
    return lambda draw: [make(draw) for _ in range(draw.randint(least, most))]


def strategy(make: Make) -> st.SearchStrategy[Any]:
    """For what hypothesis draws."""
    return st.integers(0, 2**62).map(lambda number: make(random.Random(number)))


def as_json(value: Any) -> bytes:
    """JSON that carries lone surrogates as escapes, as a hostile client would."""
    return json.dumps(value).encode()
