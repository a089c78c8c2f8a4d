"""One meaning of yes and no at every door: consent, thumbs and other truth values as files spell them."""

from __future__ import annotations

import math
from typing import Any

_YES = frozenset(["1", "1.0", "true", "t", "yes", "y", "on", "ja", "oui", "si", "sí", "sim", "wahr", "vrai"])
_NO = frozenset(["0", "0.0", "false", "f", "no", "n", "off", "nein", "non", "não", "falsch", "faux"])
_CONSENTED = frozenset(["given", "granted", "agreed", "accepted", "allowed", "opt_in", "opted_in"])
_REFUSED = frozenset(
    ["refused", "denied", "declined", "withdrawn", "revoked", "rejected", "not_given", "opt_out", "opted_out"]
)
_UP = frozenset(["+1", "up", "good", "like", "liked", "thumbs_up", "thumbsup", "positive", "desirable", "👍"])
_DOWN = frozenset(
    ["-1", "-1.0", "down", "bad", "dislike", "disliked", "thumbs_down", "thumbsdown", "negative", "undesirable", "👎"]
)
_SKIN_TONES = dict.fromkeys(range(0x1F3FB, 0x1F400))


def read_consent(value: Any) -> bool | None:
    """Whether training was allowed; None where nothing is said (absent, an empty cell, NaN).

    Raises ValueError for what can be read neither way: a guess would release what was refused.
    """
    if (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not _word(value))
    ):
        return None
    return _read(value, "consent", _YES | _CONSENTED, _NO | _REFUSED, "yes or no, or leave the cell empty")


def read_label(value: Any) -> bool:
    """Whether an answer was good. Raises ValueError for what is neither."""
    return _read(value, "label", _YES | _UP, _NO | _DOWN, "true or false")


def _read(value: Any, name: str, yes: frozenset[str], no: frozenset[str], wanted: str) -> bool:
    if isinstance(value, bool):
        return value
    word = _word(value) if isinstance(value, str | int | float) else ""
    if word not in yes and word not in no:
        raise ValueError(f"{name} is {value!r}; expected {wanted}")
    return word in yes


def _word(value: str | float) -> str:
    word = str(value).strip().casefold().translate(_SKIN_TONES).strip("\ufe0f:")
    return word if word[:1] in ("-", "+") else word.replace("-", "_").replace(" ", "_")
