"""Near-duplicates: texts that differ in a few words, found by MinHash and banding, for more rows than memory holds.

    signature_j = min over shingles of five words of (a_j h + b_j mod 2^64),  j = 1 ... 64
    similarity  = share of equal signature entries, an estimate of the Jaccard similarity of the shingles

Two texts are compared where one of several groups of entries is equal in both: of texts as similar as the threshold at
least 98% are. Sources: Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", section 3.4. Signatures and groups (350 bytes a text) lie in files, one group of which is
read at a time; datasketch, which keeps both in memory, takes 1.5 kB a text and six times as long.
"""

from __future__ import annotations

import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, Any

import numpy as np

from steersman.errors import ConfigError

_ENTRIES = 64
_SHINGLE = 5
_WORD = re.compile(r"\w+")
_BLOCK = 4096
_KNOWN_WORDS = 200_000
_U64 = np.uint64
Array = np.ndarray[Any, Any]


class _Words(dict[str, int]):
    """32 bits of each word, remembered because most words are seen again."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        self[word] = bits = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return bits


class NearDuplicates:
    """Texts, one after the other, and in the end which of them are near copies of an earlier one."""

    def __init__(self, threshold: float, folder: str | os.PathLike[str] | None = None) -> None:
        """
        Args:
            threshold: Jaccard similarity of the sets of five-word shingles, above 0 and at most 1.
            folder: Where the files lie, which have no names; that of temporary files by default.

        Raises ConfigError for another threshold.
        """
        if not 0 < threshold <= 1:
            raise ConfigError(f"near duplicates: {threshold} is no similarity; use one above 0 and at most 1, as 0.8")
        self._threshold = threshold
        self._rows = next(r for r in range(8, 0, -1) if r == 1 or 1 - (1 - threshold**r) ** (_ENTRIES // r) >= 0.98)
        self._words = _Words()
        draw = np.random.default_rng(7)
        self._times = draw.integers(0, 2**63, (_ENTRIES, 1), _U64) * _U64(2) + _U64(1)
        self._plus = draw.integers(0, 2**63, (_ENTRIES, 1), _U64)
        self._powers = draw.integers(0, 2**63, _SHINGLE, _U64) * _U64(2) + _U64(1)
        self._block = np.empty((_BLOCK, _ENTRIES), np.uint32)
        self._filled = self._count = 0
        self._stack = ExitStack()
        files = [tempfile.TemporaryFile(dir=folder) for _ in range(1 + _ENTRIES // self._rows)]  # noqa: SIM115
        self._signatures, *self._bands = map(self._stack.enter_context, files)

    def __enter__(self) -> NearDuplicates:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, text: str) -> None:
        """Adds a text."""
        self._block[self._filled] = self._signature(text)
        self._filled += 1
        self._count += 1
        if self._filled == _BLOCK:
            self._flush()

    def copies(self) -> Array:
        """bool [texts]: near copies of an earlier text, or of one that is itself such a copy."""
        self._flush()
        first = np.arange(self._count)  # of each text, an earlier one that it is like; itself where there is none

        def root(at: int) -> int:
            while first[at] != at:
                first[at] = first[first[at]]
                at = int(first[at])
            return at

        for file in self._bands:
            for one, two in self._candidates(file):
                alike = self._similarity(one, two) >= self._threshold
                for a, b in zip(one[alike].tolist(), two[alike].tolist(), strict=True):
                    low, high = sorted((root(a), root(b)))
                    first[high] = low
        repeats: Array = first != np.arange(self._count)
        return repeats

    def _signature(self, text: str) -> Array:
        """uint32 [64]"""
        words = _WORD.findall(text.casefold()) or [text]
        bits = np.fromiter(map(self._words.__getitem__, words), _U64, len(words))
        last = max(1, len(words) - _SHINGLE + 1)
        shingles = np.zeros(last, _U64)
        for at in range(min(_SHINGLE, len(words))):
            shingles += bits[at : at + last] * self._powers[at]
        shingles ^= shingles >> _U64(29)
        found: Array = ((shingles * self._times + self._plus).min(1) >> _U64(32)).astype(np.uint32)
        return found

    def _flush(self) -> None:
        block = self._block[: self._filled]
        self._signatures.write(block.tobytes())
        for number, file in enumerate(self._bands):
            band = block[:, number * self._rows : (number + 1) * self._rows].astype(_U64)
            keys = np.zeros(len(block), _U64)
            for column in band.T:
                keys = (keys ^ column) * _U64(0x9E3779B97F4A7C15)
                keys ^= keys >> _U64(32)
            file.write(keys.tobytes())
        self._filled = 0

    def _candidates(self, file: IO[bytes]) -> Iterator[tuple[Array, Array]]:
        """Pairs of texts with an equal band: each with the first and with the last one before it."""
        file.seek(0)
        keys = np.frombuffer(file.read(), _U64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(again) else again
        del keys
        for at in range(0, len(again), _BLOCK):
            places = again[at : at + _BLOCK]
            leaders = begins[np.searchsorted(begins, places, "right") - 1]
            yield order[leaders], order[places]
            apart = leaders != places - 1
            yield order[places[apart] - 1], order[places[apart]]

    def _similarity(self, one: Array, two: Array) -> Array:
        """float [pairs]"""
        if not len(one):
            return np.empty(0)
        self._signatures.flush()
        wanted, places = np.unique(np.concatenate([one, two]), return_inverse=True)
        size, handle = _ENTRIES * 4, self._signatures.fileno()
        read = b"".join(os.pread(handle, size, at * size) for at in wanted.tolist())
        signatures = np.frombuffer(read, np.uint32).reshape(-1, _ENTRIES)
        first, second = signatures[places[: len(one)]], signatures[places[len(one) :]]
        found: Array = (first == second).mean(1)
        return found
