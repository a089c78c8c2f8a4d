"""Constrained decoding: only tokens that keep the answer within a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np

from steersman.errors import InvalidArgumentError
from steersman.generation import EngineInfo

_TOKENIZERS: dict[int, llguidance.LLTokenizer] = {}


class JsonConstraint:
    """Admits exactly the texts that satisfy a schema, then the end of the answer; a `TokenConstraint`.

    An engine whose sampling is out of reach takes `json_schema` instead.
    """

    def __init__(self, json_schema: str, grammar: str, vocabulary: llguidance.LLTokenizer, vocab_size: int) -> None:
        self.json_schema = json_schema
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._matchers: dict[tuple[int, int], tuple[llguidance.LLMatcher, int]] = {}

    def __call__(self, prompt_index: int, sample_index: int, token_ids: Sequence[int]) -> np.ndarray:
        key = (prompt_index, sample_index)
        matcher, consumed = self._matchers.get(key) or (llguidance.LLMatcher(self._vocabulary, self._grammar), 0)
        matcher.consume_tokens(list(token_ids[consumed:]))
        self._matchers[key] = (matcher, len(token_ids))
        bitmask = llguidance.numpy.allocate_token_bitmask(1, self._vocab_size)
        llguidance.numpy.fill_next_token_bitmask(matcher, bitmask, 0)
        bits = np.unpackbits(bitmask.view(np.uint8), bitorder="little")[: self._vocab_size]
        return bits.astype(bool)


def json_constraint(tokenizer: Any, schema: str, info: EngineInfo) -> JsonConstraint:
    """The constraint of a schema.

    Raises InvalidArgumentError when the schema is not valid JSON or uses what cannot be constrained.
    """
    try:
        json.loads(schema)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
    except ValueError as error:
        raise InvalidArgumentError(f"json_schema cannot be used ({error}); send a JSON schema of an object") from None
    vocabulary = _TOKENIZERS.get(id(tokenizer))
    if vocabulary is None:
        vocabulary = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=info.vocab_size, eos_token=list(info.eos_token_ids)
        )
        _TOKENIZERS[id(tokenizer)] = vocabulary
    problem = llguidance.LLMatcher.validate_grammar(grammar, vocabulary)
    if problem:
        raise InvalidArgumentError(f"json_schema cannot be used ({problem}); simplify it")
    return JsonConstraint(schema, grammar, vocabulary, info.vocab_size)
