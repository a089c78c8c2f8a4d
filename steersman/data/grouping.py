"""Rows gathered by a key: in memory as long as they are few, in files of a temporary folder when they are many."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

Row = dict[str, Any]
_BUCKETS = 256


class Groups:
    """The rows of each key, in the order in which they came; the same rows give the same groups in the same order."""

    def __init__(self, key: Callable[[Row], bytes], held: int = 100_000) -> None:
        """
        Args:
            key: What the rows of a group have in common.
            held: Rows that are held in memory; more are divided over files by a hash of their key.
        """
        self._key = key
        self._limit = held
        self._held: list[Row] = []
        self._files: list[IO[bytes]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Groups:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def add(self, row: Row) -> None:
        """Adds a row of JSON values."""
        if self._files:
            self._write(row)
            return
        self._held.append(row)
        if len(self._held) > self._limit:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="steersman-rows-"))
            names = [Path(folder, str(number)) for number in range(_BUCKETS)]
            self._files = [self._stack.enter_context(name.open("w+b")) for name in names]
            for one in self._held:
                self._write(one)
            self._held.clear()

    def __iter__(self) -> Iterator[list[Row]]:
        yield from self._grouped(self._held)
        for file in self._files:
            file.seek(0)
            yield from self._grouped(map(orjson.loads, file))

    def _write(self, row: Row) -> None:
        bucket = hashlib.blake2b(self._key(row), digest_size=1).digest()[0]
        self._files[bucket].write(orjson.dumps(row) + b"\n")

    def _grouped(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        groups: dict[bytes, list[Row]] = {}
        for row in rows:
            groups.setdefault(self._key(row), []).append(row)
        yield from groups.values()
