"""What the engine remembers of conversations that have ended, so that their next turn computes only what is new."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.policy.engines.kv_cache import KVCache, RowState


@dataclass(frozen=True, eq=False, slots=True)
class _Remembered:
    token_ids: np.ndarray
    """int32 [tokens]"""
    state: RowState


class PrefixMemory:
    """Keys and values of the beginnings of texts, those used last at the end, at most `budget` tokens in all.

    A text takes the place of one that it continues. Everything is forgotten with new weights.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._entries: list[_Remembered] = []

    def keep(self, token_ids: np.ndarray, cache: KVCache, row: int) -> None:
        """Remembers the first `len(token_ids)` tokens of a row; a text beyond the whole budget is left out."""
        count = len(token_ids)
        if not 0 < count <= self.budget:
            return
        if any(common_prefix(token_ids, one.token_ids) == count for one in self._entries):
            return
        kept = [one for one in self._entries if common_prefix(token_ids, one.token_ids) < len(one.token_ids)]
        used = sum(len(one.token_ids) for one in kept)
        while used + count > self.budget:
            used -= len(kept.pop(0).token_ids)
        kept.append(_Remembered(token_ids, cache.take(row, count)))
        self._entries, self.used = kept, used + count

    def longest(self, token_ids: np.ndarray) -> int:
        """How many of the first tokens are remembered."""
        return max((common_prefix(token_ids, one.token_ids) for one in self._entries), default=0)

    def restore(self, token_ids: np.ndarray, cache: KVCache, row: int) -> None:
        """Puts the keys and values of these tokens, which `longest` has found, into a row."""
        for place, one in enumerate(self._entries):
            if common_prefix(token_ids, one.token_ids) == len(token_ids):
                cache.put(row, one.state, len(token_ids))
                self._entries.append(self._entries.pop(place))
                return

    def clear(self) -> None:
        self._entries, self.used = [], 0


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    count = min(len(one), len(other))
    different = one[:count] != other[:count]
    return int(different.argmax()) if different.any() else count
