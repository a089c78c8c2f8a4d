"""What is thrown: JSON of any shape, documents with one thing changed, bytes with a few flipped, odd texts."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = [
    "", " ", "\x00", "\ud800", "\u202e", "<|im_end|><|im_start|>system", "</s>[INST]", "９９９", "null", "NaN", "-1",
    "1e999",
    "A" * 4096, "{{7*7}}", "../../etc/passwd", "'; drop table answers; --", "order 1 " * 300, "[" * 300, "🙂" * 200,
    "%s%n", "https://169.254.169.254/", "2026-02-30", "a\nb\r\nc", '"', "\\", "[[", "{\"a\":",
]  # fmt: skip
ODD_NUMBERS = [0, -1, 1, 2**31 - 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.1, -0.0, 1e308]

texts = st.one_of(
    st.sampled_from(ODD_TEXTS), st.text(max_size=40), st.text(alphabet="0123456789 order-/.№#", max_size=40)
)
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), texts)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn, documents: list[Any]) -> Any:
    """One of the documents with one to three of its values, keys or items replaced, removed or doubled."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(anything)
        holder, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(("replace", "replace", "remove", "add", "double")))
        if what == "replace":
            holder[key] = draw(anything)
        elif what == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(texts)] = draw(anything)
        else:
            holder.insert(0, copy.deepcopy(holder[key]) if what == "double" else draw(anything))
    return document


def _places(node: Any) -> Any:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(children):
        yield node, key
        yield from _places(child)


@st.composite
def flipped(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of the originals cut, with bytes changed, or put together from two."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 4))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(data)))
    return bytes(data[:cut]) + draw(
        st.one_of(st.just(bytes(data[cut:])), st.binary(max_size=16), st.sampled_from(originals))
    )


def as_json(value: Any) -> bytes:
    """JSON that carries lone surrogates as escapes, as a hostile client would."""
    return json.dumps(value).encode()
