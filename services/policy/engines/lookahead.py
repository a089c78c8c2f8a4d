"""Drafts without a draft model: what followed the last words where they stood before.

Answers over records repeat them: order numbers, names, dates, whole sentences. A draft is checked by one forward pass
over all its tokens, which costs little more than one token where reading the weights is what takes the time. Every
token is drawn from the model's distribution with the random number that it would have had without a draft, and the
draft is followed as long as it is what was drawn, so that the samples are the same up to rounding (Saxena 2023, prompt
lookup decoding; Leviathan et al. 2023, arXiv 2211.17192, for exactness).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_NGRAMS = (4, 3)
"""Tokens that must stand the same; the longest is tried first."""
_FEWEST, _MOST = 4, 16
"""Tokens of a draft."""
_LONGEST_PAUSE = 32
"""Steps without a draft after wrong ones."""


class Lookahead:
    """The drafts of one sample."""

    def __init__(self, prompt: np.ndarray) -> None:
        self._prompt = len(prompt)
        self._ids: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        """N-gram -> place of the token that followed it last."""
        self._most = _FEWEST
        self._pause = self._skip = 0
        self._read(prompt.tolist())

    def _read(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            for size in _NGRAMS:
                if len(self._ids) >= size:
                    self._followers[tuple(self._ids[-size:])] = len(self._ids)
            self._ids.append(token)

    def draft(self, token_ids: Sequence[int], room: int) -> list[int]:
        """At most `room` tokens that may come next, often none; `token_ids` are those of the answer so far."""
        self._read(token_ids[len(self._ids) - self._prompt :])
        if self._skip:
            self._skip -= 1
            return []
        for size in _NGRAMS:
            place = self._followers.get(tuple(self._ids[-size:]))
            if place is not None:
                period = len(self._ids) - place  # what comes round faster than a draft is long goes on so
                return [self._ids[place + i % period] for i in range(min(self._most, room))]
        return []

    def learn(self, drafted: int, right: int) -> None:
        """Longer drafts while they are right; none for a while where they are not."""
        if right:
            self._pause = 0
            self._most = min(2 * self._most, _MOST) if right == drafted else max(right, _FEWEST)
        else:
            self._pause = min(max(2 * self._pause, 2), _LONGEST_PAUSE)
            self._skip, self._most = self._pause, _FEWEST
