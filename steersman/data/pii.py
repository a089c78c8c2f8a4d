"""Personal data out of texts: e-mail, phone, card and IBAN by checked patterns, names by a language model on request.

Detection is Presidio's; each find is replaced by a tag such as <EMAIL>, the same in prompt, answers and facts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from steersman.errors import ConfigError

Entity = Literal["email", "phone", "card", "iban", "name"]
_TAGS = {
    "EMAIL_ADDRESS": "<EMAIL>",
    "PHONE_NUMBER": "<PHONE>",
    "CREDIT_CARD": "<CARD>",
    "IBAN_CODE": "<IBAN>",
    "PERSON": "<NAME>",
}
# Cheap tests that every match of a recognizer passes; phone matching is slow, and most texts hold no number.
_HINTS = {
    "email": re.compile("@"),
    "phone": re.compile(r"(?:\d[\s()./+\-–]{0,3}){7}"),
    "card": re.compile(r"(?:\d[ -]?){12}"),
    "iban": re.compile(r"[A-Za-z]{2} ?\d"),
}


class PiiOptions(BaseModel):
    """What a release scrubs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entities: tuple[Entity, ...] = ("email", "phone", "card", "iban")
    """Kinds to look for; empty scrubs nothing."""
    regions: tuple[str, ...] = ("US", "GB", "DE", "FR", "IN", "CA", "BR", "AU", "ES", "IT", "NL")
    """Countries whose phone numbers are recognised without a country code."""
    name_model: str = "en_core_web_sm"
    """spaCy pipeline that finds names, where "name" is among the entities."""


class Scrubber:
    """Finds and replaces personal data."""

    def __init__(self, options: PiiOptions | None = None) -> None:
        self._options = options or PiiOptions()
        self.found: Counter[str] = Counter()
        """Replacements so far, by tag."""

    def scrub(self, text: str) -> str:
        """The text with personal data replaced by tags."""
        spans = [*self._pattern_spans(text), *self._name_spans(text)]
        if not spans:
            return text
        # Of overlapping finds the surer, then the longer stays.
        spans.sort(key=lambda span: (-span[3], span[0] - span[1]))
        kept: list[tuple[int, int, str, float]] = []
        for span in spans:
            if all(span[1] <= other[0] or other[1] <= span[0] for other in kept):
                kept.append(span)
        for start, end, tag, _ in sorted(kept, reverse=True):
            text = text[:start] + tag + text[end:]
            self.found[tag] += 1
        return text

    def scrub_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with all its texts scrubbed; id, source, licence and customer stay."""
        fixed = ("id", "source", "licence", "customer")
        return {name: value if name in fixed else self._walk(value) for name, value in row.items()}

    def _walk(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.scrub(value)
        if isinstance(value, dict):
            return {name: part if name == "role" else self._walk(part) for name, part in value.items()}
        return [self._walk(part) for part in value] if isinstance(value, list) else value

    def _pattern_spans(self, text: str) -> list[tuple[int, int, str, float]]:
        return [
            (find.start, find.end, _TAGS[find.entity_type], find.score)
            for entity, recognizer in self._recognizers.items()
            if _HINTS[entity].search(text)
            for find in recognizer.analyze(text, recognizer.supported_entities, None) or []
        ]

    def _name_spans(self, text: str) -> list[tuple[int, int, str, float]]:
        if "name" not in self._options.entities:
            return []
        return [
            (entity.start_char, entity.end_char, _TAGS["PERSON"], 0.3)
            for entity in self._pipeline(text).ents
            if entity.label_ in ("PERSON", "PER")
        ]

    @cached_property
    def _recognizers(self) -> dict[str, Any]:
        if not set(self._options.entities) & set(_HINTS):
            return {}
        from presidio_analyzer.predefined_recognizers import (
            CreditCardRecognizer,
            EmailRecognizer,
            IbanRecognizer,
            PhoneRecognizer,
        )
        from tldextract import TLDExtract

        # The snapshot of top-level domains that comes with the library; by default it would be fetched.
        domains = TLDExtract(suffix_list_urls=(), cache_dir=None)

        class OfflineEmailRecognizer(EmailRecognizer):  # type: ignore[misc]
            def validate_result(self, pattern_text: str) -> bool:
                return domains(pattern_text).fqdn != ""

        make: dict[str, Callable[[], Any]] = {
            "email": OfflineEmailRecognizer,
            "phone": lambda: PhoneRecognizer(supported_regions=self._options.regions),
            "card": CreditCardRecognizer,
            "iban": IbanRecognizer,
        }
        return {entity: make[entity]() for entity in sorted(set(self._options.entities) & set(make))}

    @cached_property
    def _pipeline(self) -> Any:
        import spacy

        try:
            return spacy.load(self._options.name_model, exclude=["parser", "lemmatizer", "attribute_ruler"])
        except OSError as error:
            raise ConfigError(
                f"pii: names need the spaCy pipeline {self._options.name_model!r}, which is not installed; "
                "install one with named entities and name it"
            ) from error
