"""One meaning of yes and no at every door: consent, thumbs and other truth values as files spell them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

_YES = frozenset(
    ["1", "1.0", "true", "t", "yes", "y", "on", "ja", "oui", "si", "sí", "sì", "sim", "wahr", "vrai", "да", "はい",
     "是"]
)  # fmt: skip
_NO = frozenset(
    ["0", "0.0", "false", "f", "no", "n", "off", "nein", "non", "não", "falsch", "faux", "nee", "nej", "nei", "нет",
     "いいえ", "否"]
)  # fmt: skip
_CONSENTED = frozenset(
    ["given", "granted", "agree", "agreed", "accept", "accepted", "allow", "allowed", "consented", "opt_in", "opted_in",
     "✓", "✔", "✅"]
)  # fmt: skip
_REFUSED = frozenset(
    ["refuse", "refused", "deny", "denied", "decline", "declined", "withdrawn", "revoked", "rejected", "disagree",
     "disallow", "disallowed", "forbidden", "not_given", "not_granted", "not_allowed", "no_consent", "opt_out",
     "opted_out", "optout", "never", "nope", "✗", "✘", "❌"]
)  # fmt: skip
_UP = frozenset(["+1", "up", "good", "like", "liked", "thumbs_up", "thumbsup", "positive", "desirable", "👍"])
_DOWN = frozenset(
    ["-1", "-1.0", "down", "bad", "dislike", "disliked", "thumbs_down", "thumbsdown", "negative", "undesirable", "👎"]
)
_SKIN_TONES = dict.fromkeys(range(0x1F3FB, 0x1F400))
#: Names of fields, without case and marks between words, that say the same as `consent`, and the opposite.
_SAYS_YES = frozenset(
    ["consent", "consentgiven", "hasconsent", "consented", "trainingconsent", "consenttraining", "consenttotraining",
     "userconsent", "customerconsent", "gdprconsent", "dataconsent", "trainingallowed", "allowtraining"]
)  # fmt: skip
_SAYS_NO = frozenset(["optout", "optedout", "donottrain", "notraining", "noconsent", "consentrefused"])
_SILENT = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\xad"))
_AROUND = " \t\r\n\"'`“”„‘’«».,;:!\ufe0f"
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


@lru_cache(maxsize=1024)
def says_consent(name: str) -> bool | None:
    """What a field of this name says where it is true: that training is allowed, or refused; None: neither."""
    word = "".join(letter for letter in name.casefold() if letter.isalnum())
    return True if word in _SAYS_YES else False if word in _SAYS_NO else None


def names_consent(names: Iterable[str]) -> bool:
    """Whether one of these fields says something about consent."""
    return any(says_consent(name) is not None for name in names)


def consent_of(record: Mapping[str, Any]) -> bool | None:
    """What the fields of a record say about consent, whatever they are called: a refusal counts before an agreement.

    Not to have opted out is no agreement. Raises ValueError for what cannot be read.
    """
    said: list[bool | None] = []
    for name, value in record.items():
        if (means := says_consent(name)) is not None:
            given = read_consent(value)
            said.append(given if means else False if given else None)
    return False if False in said else True if True in said else None


def with_one_consent(record: Any) -> Any:
    """A record that says it under the name `consent` alone; others as they are."""
    if not isinstance(record, dict) or not names_consent(name for name in record if name != "consent"):
        return record
    rest = {name: value for name, value in record.items() if says_consent(name) is None}
    return rest | {"consent": consent_of(record)}


def _word(value: str | float) -> str:
    word = unicodedata.normalize("NFKC", str(value)).translate(_SILENT).translate(_SKIN_TONES).casefold()
    word = word.strip(_AROUND)
    return word if word[:1] in ("-", "+") else word.replace("-", "_").replace(" ", "_")
