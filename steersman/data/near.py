"""Near-duplicates: texts that differ in a few words, found by MinHash and banding, for more rows than memory holds.

    a text's shingles, five words in a row, are hashed and divided over 64 bins by their first bits
    signature_j = least hash in bin j, j = 1 ... 64; an empty bin takes that of another one, chosen alike for all texts
    similarity  = share of equal signature entries, an estimate of the Jaccard similarity of the shingles

Two texts are compared where one of several groups of entries is equal in both: of texts as similar as the threshold at
least 98% are. Sources: Broder, "On the resemblance and containment of documents", 1997; Li, Owen, Zhang, "One
permutation hashing", 2012; Shrivastava, "Optimal densification for fast and accurate minwise hashing", 2017; Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4. Signatures and groups (350 bytes a text) lie in files, one
group of which is read at a time; datasketch keeps both in memory, 1.5 kB a text, and takes twenty times as long.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, Any

import numpy as np

from steersman.errors import ConfigError

_ENTRIES = 64
_SHINGLE = 5
_BLOCK = 4096
_CHARACTERS = 200_000
"""Texts are signed together until they are so long: numpy is slow over what one of them alone needs."""
_NONE = 2**32 - 1
#: First byte, range of the second and length of characters beyond ASCII that are no part of a word, in UTF-8: signs of
#: Latin-1, punctuation, arrows, mathematics and box drawing, punctuation of East Asia, emoji.
_SIGNS = ((0xC2, 0xA0, 0xBF, 2), (0xE2, 0x80, 0xAF, 3), (0xE3, 0x80, 0x80, 3), (0xF0, 0x9F, 0x9F, 4))
#: Letters of two bytes in UTF-8, by their number, as small ones: Latin, Greek, Cyrillic.
_SMALL = np.array(
    [ord(small) if len(small := chr(code).lower()) == 1 and small < "\u0800" else code for code in range(0x800)]
)
_U64 = np.uint64
Array = np.ndarray[Any, Any]


class _Signer:
    """Texts to signatures. A word is a run of letters, digits and underscores, without regard to case."""

    def __init__(self) -> None:
        draw = np.random.default_rng(7)
        odd = draw.integers(0, 2**63, 256 + _SHINGLE + 1, _U64) * _U64(2) + _U64(1)
        self._values, self._weights, base = odd[:256], odd[256:-1], int(odd[-1])
        self._values[[byte for byte in range(128) if not (chr(byte).isalnum() or chr(byte) == "_")]] = 0
        self._values[ord("A") : ord("Z") + 1] = self._values[ord("a") : ord("z") + 1]
        self._bases = (base, pow(base, -1, 2**64))
        self._powers = np.ones((2, 1), _U64)
        self._others = np.array([draw.permutation(_ENTRIES) for _ in range(_ENTRIES)]).T

    def sign(self, texts: list[str]) -> Array:
        """uint32 [texts, 64]"""
        parts = [text.encode("utf-8", "surrogatepass") + b"\n" for text in texts]
        data = np.frombuffer(bytearray(b"\n" + b"".join(parts)), np.uint8)
        words, counts = self._words(data, np.array([*map(len, parts)]))
        if len(empty := np.flatnonzero(counts == 0)):  # all of such a text is one word
            words = np.insert(words, (counts.cumsum() - counts)[empty], [zlib.crc32(parts[at]) for at in empty])
            counts[empty] = 1
        return self._least(*self._shingles(words, counts), len(texts))

    def _words(self, data: Array, lengths: Array) -> tuple[Array, Array]:
        """uint64 [words], a hash of each, and int [texts], how many each text has.

        With p the powers of a base and v the values of bytes, a word from byte s up to e is sum(v_i p_i) / p_s.
        """
        while self._powers.shape[1] < len(data):
            last = self._powers[:, -1:] * np.array(self._bases, _U64)[:, None]
            self._powers = np.concatenate([self._powers, self._powers * last], 1)
        up, down = self._powers
        at = np.flatnonzero((data >= 0xC3) & (data <= 0xD4))
        small = _SMALL[(data[at] & 31).astype(np.int64) << 6 | data[at + 1] & 63]
        data[at], data[at + 1] = 0xC0 | small >> 6, 0x80 | small & 63
        values = self._values.take(data)
        for first, low, high, length in _SIGNS:
            at = np.flatnonzero(data == first)
            at = at[(data[at + 1] >= low) & (data[at + 1] <= high)]
            for step in range(length):
                values[at + step] = 0
        inside = values != 0
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        starts, ends = edges[::2], edges[1::2]
        sums = np.cumsum(values * up[: len(data)])
        counts = np.diff(np.searchsorted(starts, lengths.cumsum()), prepend=0)
        return (sums[ends] - sums[starts]) * down[starts], counts

    def _shingles(self, words: Array, counts: Array) -> tuple[Array, Array]:
        """uint64 [shingles], a hash of each, and int [shingles], whose it is. A text of fewer words has one shingle."""
        owners = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(words)) + (_SHINGLE - 1) * owners  # nothing stands between two texts
        apart = np.zeros(len(words) + (_SHINGLE - 1) * len(counts), _U64)
        apart[places] = words
        sums = sum(apart[at : len(apart) - _SHINGLE + 1 + at] * weight for at, weight in enumerate(self._weights))
        number = np.arange(len(words)) - np.repeat(counts.cumsum() - counts, counts)
        begins = number < np.repeat(np.maximum(1, counts - _SHINGLE + 1), counts)
        return np.asarray(sums)[places[begins]], owners[begins]

    def _least(self, shingles: Array, owners: Array, texts: int) -> Array:
        shingles = (shingles ^ shingles >> _U64(32)) * _U64(0x9E3779B97F4A7C15)
        shingles = (shingles ^ shingles >> _U64(29)) * _U64(0xBF58476D1CE4E5B9)
        shingles ^= shingles >> _U64(32)
        bins = owners * _ENTRIES + (shingles >> _U64(58)).astype(np.int64)
        smallest = np.full(texts * _ENTRIES, _NONE, np.uint32)
        np.minimum.at(smallest, bins, (shingles >> _U64(26)).astype(np.uint32))
        least = smallest.reshape(texts, _ENTRIES)
        rows, columns = np.nonzero(least == _NONE)
        filled = least.copy()
        for other in self._others:
            found = least[rows, other[columns]]
            filled[rows, columns] = found
            empty = found == _NONE
            rows, columns = rows[empty], columns[empty]
        return filled


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
        self._signer = _Signer()
        self._texts: list[str] = []
        self._characters = self._count = 0
        self._stack = ExitStack()
        files = [tempfile.TemporaryFile(buffering=1 << 18, dir=folder) for _ in range(1 + _ENTRIES // self._rows)]  # noqa: SIM115
        self._signatures, *self._bands = map(self._stack.enter_context, files)

    def __enter__(self) -> NearDuplicates:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, text: str) -> None:
        """Adds a text."""
        self._texts.append(text)
        self._characters += len(text)
        self._count += 1
        if self._characters >= _CHARACTERS or len(self._texts) == _BLOCK:
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

    def _flush(self) -> None:
        if not self._texts:
            return
        block = self._signer.sign(self._texts)
        self._texts.clear()
        self._characters = 0
        self._signatures.write(block.tobytes())
        bands = block[:, : len(self._bands) * self._rows].reshape(len(block), -1, self._rows)
        keys = np.zeros(bands.shape[:2], _U64)
        for place in range(self._rows):
            keys = (keys ^ bands[:, :, place]) * _U64(0x9E3779B97F4A7C15)
            keys ^= keys >> _U64(32)
        for file, column in zip(self._bands, keys.T, strict=True):
            file.write(column.tobytes())

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
