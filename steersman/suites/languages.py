"""Which language a text is in, by py3langid (Lui and Baldwin 2012), which needs no network."""

from __future__ import annotations

import functools
from typing import Any

_LEAST_LETTERS = 12
"""Of a shorter text nothing is said."""
LANGUAGES = (
    "ar", "bg", "cs", "da", "de", "el", "en", "es", "et", "fi", "fr", "he", "hi", "hr", "hu", "id", "it", "ja", "ko",
    "lt", "lv", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sv", "th", "tr", "uk", "vi", "zh",
)  # fmt: skip
"""Told apart; the identifier knows more, which short texts are taken for by mistake."""


def language_of(text: str) -> str | None:
    """ISO 639-1 code; None where the text is too short to say."""
    if sum(letter.isalpha() for letter in text) < _LEAST_LETTERS:
        return None
    return str(_identifier().classify(text)[0])


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES))
    return identifier
