"""Statements about orders, deliveries, invoices and stock that no record supports: held back, or marked.

    responses -> whole sentences -> what a sentence states -> is there a record? -> given, left out or marked

The check reads sentences, in many languages (`services.gateway.tools.languages`). It errs on the side of silence: what
names a record, or speaks of the records that were asked for, and sounds like a fact needs one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from services.gateway.answer import Answer, Lookup
from services.gateway.metrics import Metrics
from services.gateway.systems.base import Kind
from services.gateway.tools.languages import FACTS, MARKERS, STATES, UNKNOWN
from services.gateway.tools.reading import Reader, Wish, any_of, fold, plain
from services.gateway.tools_config import ToolsConfig
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse, TokenLogprob

_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]|\n")
_LONGEST_SENTENCE = 600
_AT_ONCE = 8
"""Sentences that are read before others get their turn."""
_PIECE = 4000
_FACT, _STATE, _UNKNOWN = any_of(FACTS), any_of(STATES), any_of(UNKNOWN)
_AMOUNT = re.compile(r"[€$£¥]\s?\d|\d\s?(?:[€$£¥]|eur\b|usd\b|gbp\b|chf\b)|\d[.,]\d\d\b|\d{4}-\d\d-\d\d|\d\d?\.\d\d?\.")
_WORD = re.compile(r"[\w./-]*\w")

Verdict = Literal["none", "sourced", "unsourced"]


@dataclass(frozen=True, slots=True)
class Ground:
    """What an answer may rest on."""

    reader: Reader
    asked: frozenset[Kind]
    """Kinds of records that the question is about: sentences that name none speak of these."""
    lookups: Sequence[Lookup]
    """Grows while tools are called."""
    told: frozenset[str] = frozenset()
    """Words of what the calling application says itself, in system and tool turns."""
    told_kinds: frozenset[Kind] = frozenset()
    """Kinds of records that it speaks of."""

    def judge(self, sentence: str) -> Verdict:
        """Whether a sentence states something about records, and whether one is there for it."""
        text = plain(sentence)[: 2 * _LONGEST_SENTENCE]
        folded = fold(text)
        if folded.rstrip("\"'”’)] ").endswith(("?", "؟")) or _UNKNOWN.search(folded):
            return "none"
        named = self.reader.named(text)
        kinds = {kind for kind, _ in named} - {"customer"} or self.asked
        numbers = {number for _, number in named if number}
        fact = _FACT.search(folded) or _AMOUNT.search(folded) or (numbers and _STATE.search(folded))
        if not kinds or not fact:
            return "none"
        found = [lookup for lookup in self.lookups if lookup.outcome == "found"]
        if numbers:
            known = {word for look in found for word in _words(look.text)} | self.told
            known |= {source.record.rpartition("/")[2].casefold() for look in found for source in look.records}
            return "sourced" if all(number.casefold() in known for number in numbers) else "unsourced"
        if self.told_kinds & kinds:
            return "sourced"
        return "sourced" if any(_supports(lookup, kinds) for lookup in found) else "unsourced"


def _supports(lookup: Lookup, kinds: Collection[Kind]) -> bool:
    """Whether what was read can be about these kinds: an order knows of its delivery and invoice, not of stock."""
    if lookup.tool in ("stock", "check_stock"):
        return "stock" in kinds
    if lookup.tool in ("customer", "customer_data"):
        return False
    ours = lookup.tool in ("order", "delivery", "invoice", "find_order", "find_delivery", "find_invoice")
    return not ours or bool({"order", "delivery", "invoice"} & set(kinds))


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(plain(text))}


def ground_of(reader: Reader, asked: Iterable[Wish], lookups: Sequence[Lookup], texts: Iterable[str]) -> Ground:
    """Args:
    asked: what the question asks for.
    lookups: what was read; the list may grow.
    texts: what the calling application says itself.
    """
    told: set[str] = set()
    kinds: set[Kind] = set()
    for text in texts:
        for begin in range(0, len(text), _PIECE):  # in pieces: no step holds other threads up for long
            piece = text[begin : begin + _PIECE + 100]
            told |= _words(piece)
            kinds |= {kind for _, _, kind in reader.mentions(fold(piece))}
    topics = frozenset(wish.kind for wish in asked if wish.kind != "customer")
    return Ground(reader, topics, lookups, frozenset(told), frozenset(kinds))


def told_by_application(request: PolicyServiceChatRequest) -> list[str]:
    """The texts of system and tool turns."""
    return [message.content for message in request.messages if message.role in ("system", "tool") and message.content]


@dataclass(slots=True)
class _Choice:
    text: str = ""
    """Not given out yet."""
    read: int = 0
    """Characters that arrived."""
    said: int = 0
    """Characters that tokens arrived for."""
    tokens: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    """With the place where each ends."""
    verdicts: set[Verdict] = field(default_factory=set)
    noted: bool = False


class Claims:
    """Watches answers."""

    def __init__(self, config: ToolsConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics

    async def watched(
        self, answer: Answer, ground: Ground, stream: AsyncGenerator[PolicyServiceChatResponse, None]
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        """The stream by whole sentences, without (or with a mark behind) those that no record supports."""
        choices: dict[int, _Choice] = {}
        async with contextlib.aclosing(stream) as responses:
            async for response in responses:
                choice = choices.setdefault(response.choice_index, _Choice())
                self._take(choice, response)
                given: list[str] = []
                for sentence in _sentences(choice, final=bool(response.finish_reason)):
                    given.append(self._given(answer, ground, choice, sentence))
                    if len(given) % _AT_ONCE == 0:
                        await asyncio.sleep(0)
                response.delta = "".join(given)
                del response.tokens[:]
                response.tokens.extend(_ripe(choice))
                if response.finish_reason:
                    self._count(choice)
                told = response.delta or response.tokens or response.prompt_logprobs
                if told or response.tool_calls or response.finish_reason:
                    yield response

    def refused(self) -> None:
        """Counts an answer that was refused because nothing supports it."""
        self._metrics.claims.labels("refused").inc()

    def _take(self, choice: _Choice, response: PolicyServiceChatResponse) -> None:
        choice.text += response.delta
        choice.read += len(response.delta)
        for token in response.tokens:
            choice.said += len(token.text)
            # A token may be ahead of its text while a character or a stop text is not decided.
            choice.tokens.append((max(choice.said, choice.read), token))

    def _given(self, answer: Answer, ground: Ground, choice: _Choice, sentence: str) -> str:
        verdict = ground.judge(sentence)
        choice.verdicts.add(verdict)
        if verdict != "unsourced":
            return sentence
        answer.unsourced += 1
        body = sentence.rstrip()
        space = sentence[len(body) :]
        if self._config.unsourced == "mark":
            return f"{body} {self._config.mark_text}{space}"
        choice.tokens.clear()
        note = "" if choice.noted else self._config.held_text
        choice.noted = True
        lead = sentence[: len(sentence) - len(sentence.lstrip())]
        return f"{lead}{note}{space}" if note else ""

    def _count(self, choice: _Choice) -> None:
        outcome = "none"
        if "unsourced" in choice.verdicts:
            outcome = "held" if self._config.unsourced == "hold" else "marked"
        elif "sourced" in choice.verdicts:
            outcome = "sourced"
        self._metrics.claims.labels(outcome).inc()


def _sentences(choice: _Choice, *, final: bool) -> list[str]:
    """Takes the sentences that are complete off a choice's text."""
    found, begin = [], 0
    for match in _END.finditer(choice.text):
        if match.group().startswith(".") and _abbreviation(choice.text[begin : match.start()]):
            continue
        found.append(choice.text[begin : match.end()])
        begin = match.end()
    rest = choice.text[begin:]
    while rest and (final or len(rest) > _LONGEST_SENTENCE):
        cut = len(rest) if len(rest) <= _LONGEST_SENTENCE else rest.rfind(" ", 1, _LONGEST_SENTENCE)
        cut = cut if cut > 0 else _LONGEST_SENTENCE
        found.append(rest[:cut])
        rest = rest[cut:]
    choice.text = rest
    return found


def _abbreviation(before: str) -> bool:
    """Whether a dot behind this rather belongs to a number: `no.`, `26.`."""
    word = before.rpartition(" ")[2].casefold()
    return word in MARKERS or word.isdigit()


def _ripe(choice: _Choice) -> list[TokenLogprob]:
    """The tokens whose text has been given out; none any more once something was held back."""
    if choice.noted:
        choice.tokens.clear()
    given = choice.read - len(choice.text)
    ripe = [token for end, token in choice.tokens if end <= given]
    choice.tokens = choice.tokens[len(ripe) :]
    return ripe
