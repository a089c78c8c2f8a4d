"""What a message names: records by kind and number, in many languages and ways of writing.

    text -> plain and folded text of equal length -> words of kinds, tokens with digits -> ranked wishes

Every step is linear, and a message counts with its first and last `_READ` characters only: whatever a caller sends, a
reading takes a millisecond or two.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError

from services.gateway.systems.base import Kind
from services.gateway.tools.languages import KINDS, MARKERS, Words

_READ = 4000
_MOST_FOLDED = 20_000
_NUMBERED: tuple[Kind, ...] = ("order", "delivery", "invoice")
_NUMBER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,39}")

_TOKEN = re.compile(r"[A-Za-z0-9]+(?:[._/#:°-]{1,2}[A-Za-z0-9]+)*")
_PREFIX = re.compile(r"([a-z]{1,20})[._/#:°-]{0,2}(?=[a-z]*[._/#:°-]{0,2}\d)")
_NEVER = re.compile(r"v?\d+(?:\.\d+){2,}|\d{4}-\d\d-\d\d|\d{1,2}/\d{1,2}/\d{2,4}|\d{1,2}:\d\d(?::\d\d)?", re.IGNORECASE)
_UNLIKELY = re.compile(r"\d{1,7}\.\d\d?|\d{1,2}/\d{1,2}|0\d{3,}|\d{1,2}(?:st|nd|rd|th|am|pm|h)", re.IGNORECASE)
_BETWEEN = re.compile(
    r"[\s:#(\"'*_号為为番の는은]*(?:(?:"
    + "|".join(sorted(MARKERS))
    + r"|with|the|mit|der|the|your|und|and|et|y|e|en|i|и|&|,|和|と)"
    r"[\s.:#°]+){0,4}[\s:#(\"'*_]*"
)
_MONEY_OR_TIME = re.compile(r",(?:\d\d?\b|-)|\s?(?:[%€$£¥年月日时時]|eur\b|usd\b|gbp\b|chf\b|pln\b)")
_BEFORE_MONEY = re.compile(r"(?:[€$£¥+]|\beur|\busd|\bgbp|\bchf|\d,)\s?$")


@dataclass(frozen=True, slots=True)
class Wish:
    """A record that a message asks for; without a number the latest ones."""

    kind: Kind
    number: str | None


class _Plain(dict[int, str]):
    """By code point: compatibility forms resolved, digits of all scripts as ASCII, marks and invisible ones gone."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if category == "Nd":
            found = str(unicodedata.digit(char))
        elif category in ("Mn", "Cf", "Cs"):
            found = ""
        elif category in ("Cc", "Zs", "Zl", "Zp"):
            found = " "
        else:
            found = "".join(each for each in unicodedata.normalize("NFKC", char) if not unicodedata.combining(each))
        if len(self) < _MOST_FOLDED:
            self[code] = found
        return found


class _Folded(dict[int, str]):
    """By code point of plain text: one lower-case character without its accent."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        hangul = 0xAC00 <= code <= 0xD7A3  # would fall apart into its letters
        found = (char if hangul else unicodedata.normalize("NFKD", char)[0]).casefold()[0]
        found = {"ł": "l", "ø": "o", "đ": "d", "ı": "i"}.get(found, found)
        if len(self) < _MOST_FOLDED:
            self[code] = found
        return found


_PLAIN, _FOLDED = _Plain(), _Folded()


def plain(text: str) -> str:
    """The text in plain characters: `№２` becomes `No2`."""
    return text.translate(_PLAIN)


def fold(text: str) -> str:
    """Plain text in lower case without accents; as long as `plain` of it."""
    return plain(text).translate(_FOLDED)


def any_of(words: Words) -> re.Pattern[str]:
    """A pattern that finds such words in folded text."""
    spaced, unspaced = words
    letters = "a-zа-яіїґα-ωء-ي"
    return re.compile(rf"(?<![{letters}])(?:{fold(spaced)})(?![{letters}])|{fold(unspaced)}")


class Reader:
    """Reads messages for one tenant: the words and numbers of his systems beside the built-in ones."""

    def __init__(
        self, words: Mapping[Kind, Sequence[str]] | None = None, numbers: Mapping[Kind, Sequence[str]] | None = None
    ) -> None:
        """Args:
        words: further words for a kind, as people write them.
        numbers: patterns (of Rust's `regex`, which is linear in the text) that whole numbers of a kind match; a kind
            without any takes every number.
        """
        self._stems = {}
        for kind, (spaced, unspaced) in KINDS.items():
            own = [re.escape(fold(word)) for word in (words or {}).get(kind, ())]
            self._stems[kind] = any_of(("|".join([*own, spaced]), unspaced))
        self._numbers = {kind: _Whole(patterns) for kind, patterns in (numbers or {}).items() if patterns}

    def wishes(self, text: str, most: int) -> list[Wish]:
        """Which records a message asks for, the likeliest first, at most `most`.

        A number belongs to the kind whose pattern it matches, else to the kind whose word stands nearest; a number
        without any such word may be an order, a delivery or an invoice. Dates, amounts and telephone numbers come last.
        """
        text = plain(text if len(text) <= 2 * _READ else f"{text[:_READ]} {text[-_READ:]}")[: 2 * _READ]
        folded = text.translate(_FOLDED)
        mentions = self.mentions(folded)
        near = _Nearest([mention for mention in mentions if mention[2] != "customer"])
        ranked: list[tuple[int, int, int, Sequence[Kind], str]] = []
        for position, token in enumerate(_numbers(text, folded, self._stems)):
            shaped = [kind for kind, good in self._numbers.items() if good(token.value)]
            gap, kind = (0, token.kind) if token.kind else near(token.start, token.end)
            kinds = shaped or [each for each in ((kind,) if kind else _NUMBERED) if each not in self._numbers]
            rank = -1 if shaped else int(token.unlikely)
            ranked.append((rank, max(gap - 3 * token.marked, 0), position, kinds, token.value))
        ranked = heapq.nsmallest(most, ranked)
        # A number without a word is tried as an order first, then all of them as deliveries, then as invoices.
        found = [
            (rank > 0, Wish(kinds[order], value))
            for order in range(len(_NUMBERED))
            for rank, _, _, kinds, value in ranked
            if order < len(kinds)
        ]
        likely = [wish for unlikely, wish in found if not unlikely]
        known = {wish.kind for wish in likely}
        latest = [Wish(kind, None) for _, _, kind in mentions if kind != "stock" and kind not in known]
        rest = [wish for unlikely, wish in found if unlikely]
        return list(dict.fromkeys([*likely, *latest, *rest]))[:most]

    def named(self, text: str) -> list[tuple[Kind, str | None]]:
        """The kinds that a short text speaks of, and the numbers that stand right behind their words: `order no. 2`."""
        text = plain(text)
        folded = text.translate(_FOLDED)
        mentions = self.mentions(folded)
        found: list[tuple[Kind, str | None]] = [(kind, None) for _, _, kind in mentions]
        place, last = 0, None
        for token in _numbers(text, folded, self._stems):
            while place < len(mentions) and mentions[place][1] <= token.start:
                last = mentions[place][1:]
                place += 1
            kind = token.kind
            if kind is None and last is not None and _BETWEEN.fullmatch(folded[last[0] : token.start][:40]):
                kind = last[1]
            if kind is not None and not token.unlikely:
                found.append((kind, token.value))
                last = (token.end, kind)
        return found

    def mentions(self, folded: str) -> list[tuple[int, int, Kind]]:
        """Start, end and kind of the words that name a kind of record, in their order."""
        return sorted(
            (match.start(), match.end(), kind) for kind, stem in self._stems.items() for match in stem.finditer(folded)
        )


@dataclass(frozen=True, slots=True)
class _Token:
    start: int
    end: int
    value: str
    kind: Kind | None = None
    """Named by the token itself: `order-2`."""
    marked: bool = False
    """As a number: `#2`, `No2`."""
    unlikely: bool = False
    """Rather a date, an amount, a telephone number."""


def _numbers(text: str, folded: str, stems: Mapping[Kind, re.Pattern[str]]) -> Iterator[_Token]:
    """The tokens of a text that may be numbers of records."""
    previous = -10
    for match in _TOKEN.finditer(folded):
        start, end = match.span()
        before, after = folded[max(start - 3, 0) : start], folded[end : end + 5]
        if not any(map(str.isdigit, match.group())) or end - start > 60:
            continue
        if before.endswith(("@", "/", ".", "\\")) or after.startswith("@") or _NEVER.fullmatch(match.group()):
            continue
        kind, marked = None, before.endswith("#")
        rest = start
        while prefix := _PREFIX.match(folded, rest, end):
            letters = prefix.group(1)
            named = next((kind for kind, stem in stems.items() if stem.fullmatch(letters)), None)
            # `č.2`: what is one letter with its accent, or a word of another script, is an abbreviation.
            if named is None and letters not in MARKERS and text[rest : prefix.end()].isascii():
                break
            kind, marked, rest = kind or named, True, prefix.end()
        value = text[rest:end]
        value = re.split(r"[#:°]", value)[-1]
        if not _NUMBER.fullmatch(value):
            continue
        # Digits in groups, as in telephone and card numbers; money and dates by what stands around them.
        grouped = start - previous == 1 and text[start - 1] == " " and value.isdigit() and not marked
        unlikely = not (kind or marked) and bool(
            grouped or _UNLIKELY.fullmatch(value) or _MONEY_OR_TIME.match(after) or _BEFORE_MONEY.search(before)
        )
        previous = end if value.isdigit() else -10
        yield _Token(start, end, value, kind, marked, unlikely)


class _Nearest:
    """The mention that stands nearest to a number: one before it counts a little more than one behind."""

    def __init__(self, mentions: Sequence[tuple[int, int, Kind]]) -> None:
        self._mentions = mentions
        self._starts = [start for start, _, _ in mentions]

    def __call__(self, start: int, end: int) -> tuple[int, Kind | None]:
        place = bisect_left(self._starts, start)
        found: list[tuple[int, Kind]] = []
        if place > 0:
            _, stop, kind = self._mentions[place - 1]
            found.append((max(start - stop, 0), kind))
        if place < len(self._mentions):
            begin, _, kind = self._mentions[place]
            found.append((begin - end + 2, kind))
        return min(found, default=(0, None), key=lambda entry: entry[0])


class _Whole:
    """Whether a text as a whole matches one of some patterns."""

    def __init__(self, patterns: Sequence[str]) -> None:
        joined = "|".join(f"(?:{pattern})" for pattern in patterns)
        self._adapter = TypeAdapter(Annotated[str, StringConstraints(pattern=rf"^(?i:{joined})$")])

    def __call__(self, text: str) -> bool:
        try:
            self._adapter.validate_python(text)
        except ValidationError:
            return False
        return True
