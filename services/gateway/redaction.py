"""Takes personal data and credentials out of what goes to the logs."""

from __future__ import annotations

import re
from functools import lru_cache

_PATTERNS = [
    (re.compile(r"sk-[0-9a-f]{12}-[A-Za-z0-9_-]+"), "[key]"),
    # Possessive: what is no token after all is looked at once, not from each of its characters.
    (re.compile(r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{5,}+\.[A-Za-z0-9_-]++\.[A-Za-z0-9_-]*+"), "[token]"),
    (re.compile(r"(?<=://)[^/\s@]{1,200}@"), "[credentials]@"),
    (re.compile(r"[\w.+-]{1,64}(?:@|%40)[\w-]+(?:\.[\w-]+)+"), "[e-mail]"),
    (re.compile(r"\b[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{4}){2,7}[ ]?[A-Z0-9]{0,4}\b"), "[iban]"),
    (re.compile(r"(?<![\w.-])(?:\d[ -]?){13,19}(?![\w.-])"), "[card]"),
    (re.compile(r"(?<![\w.-])(?:\+|00)\d{1,3}[ /.-]?(?:\(?\d{1,5}\)?[ /.-]?){2,5}\d(?![\w.-])"), "[phone]"),
]


_LONGEST_KEPT = 200
_HEAD, _TAIL = 2000, 6000


def redact(text: str) -> str:
    """The text without e-mail addresses, phone and card numbers, IBANs, keys and tokens; the middle of a long one is
    left out."""
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} [{len(text) - _HEAD - _TAIL} characters left out] {text[-_TAIL:]}"
    return _redacted_short(text) if len(text) <= _LONGEST_KEPT else _redacted(text)


def _redacted(text: str) -> str:
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


_redacted_short = lru_cache(maxsize=1024)(_redacted)
