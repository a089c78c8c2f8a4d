"""What counts as the same prompt or the same row, and deterministic splits that keep a prompt on one side."""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from steersman.errors import ConfigError

#: The keys that make a row what it is; the others are metadata.
CONTENT = ("messages", "prompt", "chosen", "rejected", "completion", "label", "aspects", "reward")


def normalise(text: str) -> str:
    """Text without the differences that make no other question: case and white space."""
    return " ".join(text.casefold().split())


def group_key(row: Mapping[str, Any], by: str | None = None) -> str:
    """The key that decides a row's split: its conversation's first question, or the metadata key `by`.

    The first question, not the whole prompt, because data sets hold the same conversation cut off at several turns.
    """
    if by is not None:
        return str(row.get(by, ""))
    turns = row.get("messages") or row.get("prompt") or ()
    first = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
    return normalise(first)


def encode(row: Mapping[str, Any]) -> tuple[bytes, int]:
    """A row as a JSON line, and 64 bits over everything that training sees of it: equal bits are duplicates."""
    content = {name: row[name] for name in CONTENT if name in row}
    return encode_parts(content, {name: row[name] for name in row if name not in content})


def encode_parts(content: dict[str, Any], metadata: dict[str, Any]) -> tuple[bytes, int]:
    """The same of a row in two parts; the keys of `content` are those of `CONTENT`, in its order."""
    first = orjson.dumps(content)
    return join_parts(first, metadata), fingerprint(first)


def join_parts(content: bytes, metadata: dict[str, Any]) -> bytes:
    """One JSON line of a row's content, as JSON, and its metadata."""
    return content[:-1] + b"," + orjson.dumps(metadata)[1:] if metadata else content


def fingerprint(content: bytes) -> int:
    """64 bits of a row's content, as JSON."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def content_id(content_bits: int) -> str:
    """The id of a row that has none of its own: the same wherever and whenever the row is read."""
    return f"{content_bits:016x}"


#: Of a fingerprint, how many of its last bits are looked at first.
_BITS = 27
_LAST = (1 << _BITS) - 1

#: A split's name becomes a file's name; `skipped.jsonl` has another meaning.
_NAME = re.compile(r"(?!skipped$)[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Splits:
    """Assigns rows to named shares by a hash of their group: the same row lands on the same side in every run."""

    def __init__(self, shares: Mapping[str, float], *, seed: int = 0, by: str | None = None, salt: str = "") -> None:
        """
        Args:
            shares: Name -> share of the groups.
            seed: Another seed is another draw.
            by: Metadata key whose values stay on one side; the first question by default.
            salt: Draws of different salts are independent: the one side of a split can be split again.
        """
        for name in shares:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"splits: {name!r} is no name of a split; use letters, digits, - and _, as train")
        if len({name.casefold() for name in shares}) < len(shares):  # some file systems do not tell them apart
            raise ConfigError(f"splits: {', '.join(shares)} differ in capitals only; give each split a name of its own")
        good = all(math.isfinite(share) and share >= 0 for share in shares.values())
        if not shares or not good or abs(sum(shares.values()) - 1) > 1e-6:
            raise ConfigError(f"splits: shares {dict(shares)} must be positive and sum to 1, as train=0.9,test=0.1")
        self.names = list(shares)
        self._bounds = np.cumsum(list(shares.values())).tolist()[:-1]
        key = hashlib.blake2b(f"{salt}:{seed}".encode()).digest() if salt else str(seed).encode()
        self._hash = hashlib.blake2b(digest_size=8, key=key)
        self._by = by
        self.ungrouped = 0
        """Rows so far without the key that decides: they lie together on one side."""

    def of(self, row: Mapping[str, Any]) -> str:
        """The split of a row."""
        self.ungrouped += self._by is not None and row.get(self._by) in (None, "")
        return self.of_key(group_key(row, self._by))

    def of_key(self, key: str) -> str:
        hashed = self._hash.copy()
        hashed.update(key.encode())
        return self.names[bisect(self._bounds, int.from_bytes(hashed.digest(), "little") / 2**64)]


class SeenSet:
    """A growing set of 64-bit fingerprints that costs 8 bytes each: a small hash set before a sorted array.

    Fingerprints are even over their range, so one bit for each value of their last bits tells nearly always that one is
    new, without a search in an array that no cache holds: of ten million, one in fourteen is looked for in vain.
    """

    def __init__(self, recent: int = 1_000_000) -> None:
        self._recent: set[int] = set()
        self._limit = recent
        self._sorted = np.empty(0, np.uint64)
        self._bits = bytearray()
        """2**_BITS bits: which last bits occur in the array."""

    def __contains__(self, value: int) -> bool:
        if value in self._recent:
            return True
        if not self._bits or not self._bits[(value & _LAST) >> 3] >> (value & 7) & 1:
            return False
        at = int(self._sorted.searchsorted(np.uint64(value)))
        return at < len(self._sorted) and int(self._sorted[at]) == value

    def add(self, value: int) -> bool:
        """Adds a fingerprint; False when it was there already."""
        if value in self:
            return False
        self._recent.add(value)
        if len(self._recent) >= self._limit:
            self._settle()
        return True

    def _settle(self) -> None:
        """Moves the recent ones into the array."""
        fresh = np.fromiter(self._recent, np.uint64, len(self._recent))
        self._recent.clear()
        self._sorted = np.sort(np.concatenate([self._sorted, fresh]))
        self._bits = self._bits or bytearray(1 << _BITS - 3)
        last = fresh & np.uint64(_LAST)
        ones = np.uint8(1) << (last & np.uint64(7)).astype(np.uint8)
        np.bitwise_or.at(np.frombuffer(self._bits, np.uint8), last >> np.uint64(3), ones)
