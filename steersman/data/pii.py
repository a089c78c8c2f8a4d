"""Personal data out of texts: e-mail, phone, card and IBAN by checked patterns, names by a language model on request.

Each find is replaced by a tag such as <EMAIL>, the same in prompt, answers and facts. E-mail, cards and IBAN are
Presidio's; phone numbers are not, because any order number is a possible number of some country: see `phones`.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from steersman.data.phones import LOOK_BACK, belongs_to_business, is_called_personal, phone_spans
from steersman.data.plain import plain_text
from steersman.errors import ConfigError

Entity = Literal["email", "phone", "card", "iban", "name"]
_TAGS = {
    "EMAIL_ADDRESS": "<EMAIL>",
    "PHONE_NUMBER": "<PHONE>",
    "CREDIT_CARD": "<CARD>",
    "IBAN_CODE": "<IBAN>",
    "PERSON": "<NAME>",
}
# Cheap tests that every match of a recognizer passes.
_HINTS = {
    "email": re.compile("@"),
    "card": re.compile(r"(?:\d[ -]?){12}"),
    "iban": re.compile(r"\d(?<=[A-Za-z]{2}\d)\d"),
}
# What every number that is looked for holds. It begins with a digit: a text without one is passed at a glance.
_NUMBER = re.compile(r"\d(?:[\d ()./\u2013\u00a0-]{5,22}\d|(?<=[A-Za-z]{2}\d)\d)")
_NUMBERS = ("<PHONE>", "<CARD>")
# The same of a text's UTF-8, its bytes put into classes: digits, what may stand between them, letters, and what other
# scripts' digits begin with. A pattern that begins with one fixed byte is searched for ten times faster.
_CLASSES = {
    b"0": string.digits.encode(),
    b"-": " ()./-\u2013\u00a0".encode(),
    b"a": string.ascii_letters.encode(),
    b"\xff": b"\xd9\xdb\xdf\xe0\xe1\xea\xef\xf0",
}
_TO_CLASSES = bytes.maketrans(b"".join(_CLASSES.values()), b"".join(name * len(of) for name, of in _CLASSES.items()))
_CLASSED_NUMBER = re.compile(rb"0(?:[0-]{5,66}0|(?<=aa0)0)")
_CARD_DIGITS = 12  # at least
_FIXED = frozenset({"id", "source", "licence", "customer", "origin"})
_SAMPLES = 5
_PERSONAL_KEY = re.compile(r"phone|mobile|tel|fax|card|contact", re.IGNORECASE)

Span = tuple[int, int, str, float]
"""First and last character, tag, certainty."""


class PiiOptions(BaseModel):
    """What a release scrubs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entities: tuple[Entity, ...] = ("email", "phone", "card", "iban")
    """Kinds to look for; empty scrubs nothing."""
    regions: tuple[str, ...] = ("US", "GB", "DE", "FR", "IN", "CA", "BR", "AU", "ES", "IT", "NL")
    """Countries whose phone numbers are recognised without a country code."""
    keep: tuple[str, ...] = ()
    """Regular expressions of the business's own numbers, as `4711-[0-9]{4}`: what matches one wholly stays. The numbers
    of a row's `facts`, and others of their shape, stay too."""
    name_model: str = "en_core_web_sm"
    """spaCy pipeline that finds names, where "name" is among the entities."""

    @field_validator("keep")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return patterns


class Scrubber:
    """Finds and replaces personal data."""

    def __init__(self, options: PiiOptions | None = None) -> None:
        self._options = options or PiiOptions()
        self._keep = [re.compile(pattern) for pattern in self._options.keep]
        self.found: Counter[str] = Counter()
        """Replacements so far, by tag."""
        self.samples: dict[str, list[str]] = defaultdict(list)
        """A few replacements by tag: what stands before it in the scrubbed text, and the shape of what it was."""

    def scrub(self, text: str, known: frozenset[str] = frozenset()) -> str:
        """The text with personal data replaced by tags.

        Args:
            text: Any text.
            known: The business's own numbers, and shapes of such (every digit a 9).
        """
        scrubbed, behind = "", 0
        for start, end, tag in self.find(text, known):
            scrubbed += text[behind:start]
            self.found[tag] += 1
            if len(self.samples[tag]) < _SAMPLES:
                self.samples[tag].append(f"{scrubbed[-24:]}{tag}, was {_shape(text[start:end], letters=True)}")
            scrubbed, behind = scrubbed + tag, end
        return scrubbed + text[behind:]

    def find(self, text: str, known: frozenset[str] = frozenset()) -> list[tuple[int, int, str]]:
        """(first character, character behind the last, tag) of what `scrub` would replace, from left to right."""
        if not self._may_hold(text):
            return []
        spans = [span for span in self._spans(text) if not self._is_known(text, span, known)]
        # Of overlapping finds the surer, then the longer stays.
        spans.sort(key=lambda span: (-span[3], span[0] - span[1]))
        kept: list[Span] = []
        for span in spans:
            if all(span[1] <= other[0] or other[1] <= span[0] for other in kept):
                kept.append(span)
        return [(start, end, tag) for start, end, tag, _ in sorted(kept)]

    def scrub_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with all its texts scrubbed, itself where there is nothing to scrub; what names the row, its source and
        its tenant stays."""
        text = plain_text(row, _FIXED)
        if text is not None and not self._may_hold(text):
            return row
        texts = {name: value for name, value in row.items() if name not in _FIXED}
        known, before = frozenset(_business_numbers(row.get("facts"))), self.found.total()
        scrubbed = {name: self._walk(value, known) for name, value in texts.items()}
        return row | scrubbed if self.found.total() != before else row

    def _may_hold(self, text: str) -> bool:
        """Whether it is worth a look: most texts are passed at a glance."""
        return "name" in self._options.entities or "@" in text or _holds_suspect(text)

    def _is_known(self, text: str, span: Span, known: frozenset[str]) -> bool:
        start, end, tag, certainty = span
        found = text[start:end]
        if any(pattern.fullmatch(found) for pattern in self._keep):
            return True
        if tag not in _NUMBERS:
            return False
        if found in known or (certainty < 0.9 and _shape(found) in known):
            return True
        return tag == "<CARD>" and belongs_to_business(text, start)

    def _walk(self, value: Any, known: frozenset[str]) -> Any:
        if isinstance(value, str):
            return self.scrub(value, known)
        if isinstance(value, dict):
            return {name: part if name == "role" else self._walk(part, known) for name, part in value.items()}
        return [self._walk(part, known) for part in value] if isinstance(value, list) else value

    def _spans(self, text: str) -> Iterator[Span]:
        if "phone" in self._options.entities:
            for start, end, certainty in phone_spans(text, self._options.regions):
                yield start, end, _TAGS["PHONE_NUMBER"], certainty
        yield from self._pattern_spans(text)
        yield from self._name_spans(text)

    def _pattern_spans(self, text: str) -> list[Span]:
        return [
            (find.start, find.end, _TAGS[find.entity_type], find.score)
            for entity, hint in _HINTS.items()
            if entity in self._options.entities and hint.search(text)
            for recognizer in [self._recognizers[entity]]  # loaded only where something looks like it
            for find in recognizer.analyze(text, recognizer.supported_entities, None) or []
        ]

    def _name_spans(self, text: str) -> list[Span]:
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
        )
        from tldextract import TLDExtract

        # The snapshot of top-level domains that comes with the library; by default it would be fetched.
        domains = TLDExtract(suffix_list_urls=(), cache_dir=None)

        class OfflineEmailRecognizer(EmailRecognizer):
            def validate_result(self, pattern_text: str) -> bool:
                return domains(pattern_text).fqdn != ""

        make: dict[str, Callable[[], Any]] = {
            "email": OfflineEmailRecognizer,
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


def _holds_suspect(text: str) -> bool:
    """Whether some number of a text, or of several on lines of their own, may be a card, an IBAN or a phone number.

    Most numbers of a business are not: a few digits, or more of them in one run that no word calls a phone number.
    """
    raw = text.encode(errors="surrogatepass")
    classes = raw.translate(_TO_CLASSES)
    if b"\xff" in classes:
        return _NUMBER.search(text) is not None
    found = _CLASSED_NUMBER.finditer(classes)
    return any(not _is_plain_run(raw, classes, *number.span()) for number in found) and _NUMBER.search(text) is not None


def _is_plain_run(raw: bytes, classes: bytes, start: int, end: int) -> bool:
    """Whether a find is digits alone, with nothing before it that makes a card, an IBAN or a phone number of it."""
    if end - start >= _CARD_DIGITS or b"-" in classes[start:end] or classes[max(0, start - 2) : start] == b"aa":
        return False
    if raw.startswith(b"00", start) or b"+" in raw[max(0, start - 2) : start]:  # of +(49...), too
        return False
    before = raw[max(0, start - 4 * LOOK_BACK) : start].decode(errors="ignore")  # a character has four bytes at most
    return not is_called_personal(before, len(before))


def _business_numbers(facts: Any, key: str = "") -> Iterator[str]:
    """Numbers among a row's facts, and their shapes; not those that are a person's own."""
    if isinstance(facts, dict):
        for name, value in facts.items():
            yield from _business_numbers(value, str(name))
    elif isinstance(facts, list):
        for value in facts:
            yield from _business_numbers(value, key)
    elif isinstance(facts, str | int) and not isinstance(facts, bool) and not _PERSONAL_KEY.search(key):
        text = str(facts)
        if sum(letter.isdigit() for letter in text) >= 4:
            yield from (text, _shape(text))


def _shape(text: str, *, letters: bool = False) -> str:
    """Every digit as 9, and every letter as x on request."""
    shape = re.sub(r"\d", "9", text)
    return re.sub(r"[^\W\d_]", "x", shape) if letters else shape
