"""Answers that rest on looked-up records, on their way into training data.

What such an answer says is the customer's (names, amounts), and without the record before it a model that learns from
it learns to invent. So these answers are left out, and so are later ones whose conversation quotes them, unless a
release takes them with their records, which the gateway keeps only where it is told to (`keeping.lookupTexts`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from steersman.data.format import Skip
from steersman.data.rules import Lookups
from steersman.store.models import Answer

_PEOPLE = 1000
"""End customers whose earlier answers are remembered at once."""


class Quotes:
    """What may be released of answers, by the releases' option `lookups`."""

    def __init__(self, session: Session, lookups: Lookups) -> None:
        self._session = session
        self._include = lookups == "include"
        self._quoting = lru_cache(_PEOPLE)(self._answers_with_records)

    def prompt(self, answer: Answer) -> list[dict[str, Any]] | Skip:
        """The conversation before an answer, with what was looked up for it where that is released."""
        if not _found(answer.lookups):
            if not self._include and self._quotes_an_earlier_answer(answer):
                return Skip("its conversation quotes looked-up records")
            return answer.prompt
        if not self._include:
            return Skip("rests on looked-up records")
        if not all(lookup.get("text_read") for lookup in _found(answer.lookups)):
            return Skip("its looked-up records were not kept")
        return _with_context(answer.prompt, "\n".join(filter(None, (one.get("text_read") for one in answer.lookups))))

    def _quotes_an_earlier_answer(self, answer: Answer) -> bool:
        said = {_digest(turn.get("content") or "") for turn in answer.prompt if turn.get("role") == "assistant"}
        return bool(said) and not said.isdisjoint(self._quoting(answer.customer, answer.end_customer))

    def _answers_with_records(self, customer: str, end_customer: str) -> frozenset[bytes]:
        """Digests of what one end customer was told from records."""
        rows = self._session.execute(
            sa.select(Answer.answer, Answer.lookups)
            .where(Answer.customer == customer, Answer.end_customer == end_customer)
            .execution_options(yield_per=500)
        )
        return frozenset(_digest(text) for text, lookups in rows if _found(lookups))


def _found(lookups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [lookup for lookup in lookups if lookup.get("outcome") == "found"]


def _digest(text: str) -> bytes:
    """Equal for texts that differ in their spaces only."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()


def _with_context(prompt: Sequence[dict[str, Any]], context: str) -> list[dict[str, Any]]:
    """Into the first system message, where the gateway puts it for the model."""
    if prompt and prompt[0].get("role") == "system":
        return [{**prompt[0], "content": f"{prompt[0]['content']}\n\n{context}"}, *prompt[1:]]
    return [{"role": "system", "content": context}, *prompt]
