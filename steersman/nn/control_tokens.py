"""The tokens that structure a conversation: which they are, how a text is kept from spelling one, and an encoder to
which their own names mean nothing. `steersman.nn.render` says what this is for.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from steersman.errors import ConfigError, DataError

_BRACKETS = frozenset("<>[]{}|｜")
_CONTROL_SHAPE = re.compile(r"<[|｜][^<>\s]*>|<[^<>\s]*[|｜]>")
"""Of tokens that structure a conversation: `<|x|>`, `<|x>`, `<x|>`."""
_HTML = re.compile(r"</?(?!think>)[a-z][a-z0-9]*>")
"""Added tokens that are ordinary text (Gemma has such) unless the template writes them."""


class ControlTokens:
    """The control tokens of one tokenizer, by their text."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = ids
        self._pattern = re.compile(longest_of(ids))
        self._starts = re.compile(f"(?={self._pattern.pattern})")
        self._longest = max(map(len, ids), default=0)
        self._all = "\0".join(ids)
        self._words = {word for token in ids for word in _words_of(token)}
        self._heads = {token[:size] for token in ids for size in range(1, len(token))}
        self._tails = {token[size:] for token in ids for size in range(1, len(token))}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: str) -> ControlTokens:
        """The special ones, and added ones in brackets (`<think>`, `[INST]`).

        What is left out is added text without such a meaning (runs of spaces, HTML tags): ordinary text keeps its ids.
        """
        special = set(tokenizer.all_special_ids)
        found = {}
        for token_id, token in tokenizer.added_tokens_decoder.items():
            text = token.content
            bracketed = bool(text) and text[0] in _BRACKETS and text[-1] in _BRACKETS
            structural = bracketed and (text in template or _HTML.fullmatch(text) is None)
            if (token.special or token_id in special or structural) and not text.isspace() and text:
                found[text] = token_id
        return cls(found)

    def found_in(self, text: str) -> list[int]:
        """Ids of those that a text spells, in order."""
        return [self.ids[match[0]] for match in self._pattern.finditer(text)]

    def renamed(self, text: str, mark: str, names: Mapping[str, str]) -> str:
        """The text with every token under its other name; one of a single character counts unless it is marked."""

        def name(match: re.Match[str]) -> str:
            single = len(match[0]) == 1 and text[: match.start()].endswith(mark)
            return match[0] if single else names[match[0]]

        return self._pattern.sub(name, text) if names else text

    def broken(self, text: str, mark: str) -> str:
        """The text with a mark in every token that it spells, and at an end that could complete one with what is put
        around it: a mark behind a token's first character, before one of a single character."""
        if not self.ids or not text:
            return text
        starts = [match.start() for match in self._starts.finditer(text)]
        if starts:
            places = [start + (text[start] not in self.ids) for start in starts]
            text = mark.join(text[low:high] for low, high in zip([0, *places], [*places, len(text)], strict=True))
        head, tail = text[: self._longest], text[-self._longest :]
        within = len(text) < self._longest and text in self._all and not _BRACKETS.isdisjoint(text)
        if within or text in self._words or any(head[:size] in self._tails for size in range(1, len(head) + 1)):
            text = mark + text
        if any(tail[-size:] in self._heads for size in range(1, len(tail) + 1)):
            text += mark
        return text


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer under which control tokens have secret names."""

    backend: Tokenizer
    names: Mapping[str, str]
    """Secret names by the control token's text."""
    boundary: str
    """A token of its own, beyond the vocabulary, that keeps two texts apart."""
    boundary_id: int

    @classmethod
    def under_secret_names(cls, backend: Tokenizer, control: Mapping[str, int]) -> Encoder:
        """A copy of the tokenizer with other names for its control tokens, which nobody can guess."""
        secret = secrets.token_hex(16)
        names = {text: f"{secret}{token_id:08d}" for text, token_id in control.items()}
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): token_id for text, token_id in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if "merges" in model:
            pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
            # Byte pairs that would put a control token together.
            model["merges"] = [
                pair for pair in pairs if "".join(pair) not in names and pair[0] not in names and pair[1] not in names
            ]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        encoder = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
        wrong = next((text for text, token_id in control.items() if encoder.token_to_id(names[text]) != token_id), None)
        if wrong is not None:
            raise ConfigError(f"the tokenizer's token {wrong!r} has no certain id; mend added_tokens in tokenizer.json")
        boundary = f"{secret}boundary"
        encoder.add_special_tokens([AddedToken(boundary, normalized=False)])
        boundary_id = encoder.token_to_id(boundary)
        assert boundary_id is not None
        return cls(encoder, names, boundary, boundary_id)

    def ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Raises DataError for a text that no UTF-8 says: with half a character, a lone surrogate."""
        try:
            found: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise DataError("a text holds half a character (a lone surrogate); leave it out") from None
        return found


def structures(token: AddedToken) -> bool:
    """Whether an added token is special or looks like it."""
    return token.special or _CONTROL_SHAPE.fullmatch(token.content) is not None


def _words_of(token: str) -> set[str]:
    """What a template could complete to the token by brackets around it: `/s` and `s` of `</s>`."""
    found = set()
    for start in range(1, 1 + len(token) - len(token.lstrip("<[{|｜/"))):
        for end in range(1, 1 + len(token) - len(token.rstrip(">]}|｜"))):
            found.add(token[start : len(token) - end])
    return found - {""}


def longest_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of some words at a place, in time that does not grow with their number."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return _node_pattern(root) if root else "(?!)"


def _node_pattern(node: dict[str, Any]) -> str:
    branches = []
    for character, child in node.items():
        if not character:
            continue
        text = character
        while len(child) == 1 and "" not in child:  # a chain
            ((character, child),) = child.items()
            text += character
        branches.append(re.escape(text) + _node_pattern(child))
    if not branches:
        return ""
    joined = f"(?:{'|'.join(branches)})"
    return f"{joined}?" if "" in node else joined
