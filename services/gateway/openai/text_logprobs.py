"""Log-probabilities as OpenAI's completions give them: four columns, those of an echoed prompt first.

A prompt of twenty thousand tokens makes megabytes of JSON, and whatever encodes them in one go holds everybody else up.
So a few tokens at a time become JSON as they arrive, and the answer takes the pieces over as they are.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TypedDict

import orjson

from steersman.v1.policy_pb2 import TokenLogprob

_DRIFT = 16
"""Characters behind the expected place in which a token is looked for: a tokenizer may have changed some."""


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    """None: of the prompt's first token, which nothing comes before."""
    top_logprobs: list[dict[str, float] | None]
    """The alternatives and the token itself."""
    text_offset: list[int]
    """Where in the choice's text a token begins, in characters."""


class TextTokens:
    """The tokens of one choice, in order."""

    def __init__(self, prompt: str) -> None:
        """
        Args:
            prompt: the text that the choice begins with; empty: it is not echoed.
        """
        self._prompt = prompt
        self._end = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._in_prompt = True
        self.scored = 0
        """Tokens of the prompt so far."""
        self._columns: dict[str, list[bytes]] = {name: [] for name in TextLogprobs.__annotations__}

    def of_prompt(self, tokens: Iterable[TokenLogprob]) -> tuple[str, TextLogprobs]:
        """The next tokens of the echoed prompt, and the text that they stand for."""
        begin, found = self._end, _empty()
        for token in tokens:
            piece = self._decoder.decode(token.raw)
            at, self._end = _place(self._prompt, piece, self._end)
            _append(found, token, at, first=not self.scored)
            self.scored += 1
        return self._prompt[begin : self._end], found

    def generated(self, tokens: Iterable[TokenLogprob]) -> tuple[str, TextLogprobs]:
        """The next generated tokens; the text is what is left of the prompt before the first of them."""
        left = ""
        if self._in_prompt:
            left, self._in_prompt = self._prompt[self._end :], False
            self._end = len(self._prompt)
            self._decoder.reset()
        found = _empty()
        for token in tokens:
            _append(found, token, self._end)
            self._end += len(self._decoder.decode(token.raw))
        return left, found

    def keep(self, part: TextLogprobs) -> None:
        """Adds a few tokens to the whole."""
        if part["tokens"]:
            for name, pieces in self._columns.items():
                pieces.append(orjson.dumps(part[name])[1:-1])  # type: ignore[literal-required]

    def whole(self) -> orjson.Fragment:
        """What was kept, as JSON."""
        columns = (b'"%s":[%s]' % (name.encode(), b",".join(pieces)) for name, pieces in self._columns.items())
        return orjson.Fragment(b"{" + b",".join(columns) + b"}")


def _empty() -> TextLogprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _append(found: TextLogprobs, token: TokenLogprob, offset: int, *, first: bool = False) -> None:
    found["tokens"].append(token.text)
    found["token_logprobs"].append(None if first else token.logprob)
    found["top_logprobs"].append(None if first else _alternatives(token))
    found["text_offset"].append(offset)


def _alternatives(token: TokenLogprob) -> dict[str, float]:
    """By text; of tokens with the same text, which are parts of characters, the likeliest stands for all."""
    found: dict[str, float] = {}
    for other in token.top:
        found.setdefault(other.text, other.logprob)
    found.setdefault(token.text, token.logprob)
    return found


def _place(text: str, piece: str, begin: int) -> tuple[int, int]:
    """Where a token's characters begin and end in the text; (begin, begin) for one that the text does not show."""
    for shown in (piece, piece.lstrip(" ")):
        at = text.find(shown, begin, begin + len(shown) + _DRIFT) if shown else -1
        if at >= 0:
            return at, at + len(shown)
    return begin, begin
