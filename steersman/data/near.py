"""Near-duplicates: texts that differ in a few words, found by MinHash and banding (datasketch).

About 1.5 kB a kept row; for what does not fit into memory the same rows can be compared on a cluster (docs/data.md).
"""

from __future__ import annotations

import re

from steersman.errors import ConfigError

_PERMUTATIONS = 64
_SHINGLE = 5
_WORD = re.compile(r"\w+")


class NearDuplicates:
    """A growing set of texts that knows whether a new one is nearly equal to one of them."""

    def __init__(self, threshold: float) -> None:
        """
        Args:
            threshold: Jaccard similarity of the sets of five-word shingles, above 0 and at most 1.

        Raises ConfigError for another threshold, or when the library is missing.
        """
        if not 0 < threshold <= 1:
            raise ConfigError(f"near duplicates: {threshold} is no similarity; use one above 0 and at most 1, as 0.8")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ConfigError("near duplicates need the package datasketch; install steersman[data]") from None
        self._hash = MinHash
        self._index = MinHashLSH(threshold=min(threshold, 0.999), num_perm=_PERMUTATIONS)
        self._threshold = threshold
        self._hashes: list[object] = []

    def add(self, text: str) -> bool:
        """Adds a text; False when one that was added before is at least as similar as the threshold."""
        words = _WORD.findall(text.casefold()) or [text]
        shingles = {" ".join(words[at : at + _SHINGLE]).encode() for at in range(max(1, len(words) - _SHINGLE + 1))}
        made = self._hash(num_perm=_PERMUTATIONS)
        made.update_batch(sorted(shingles))
        if any(made.jaccard(self._hashes[at]) >= self._threshold for at in self._index.query(made)):
            return False
        self._index.insert(len(self._hashes), made, check_duplication=False)
        self._hashes.append(made)
        return True
