"""Business records in a JSON file: for demonstrations, tests, and companies whose system exports one.

{"order": [{"number": "482", "customer": "C-17", "state": "packed"}, ...], "stock": [...]}

The file is read again when it has changed. Records stand in it oldest first.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from services.gateway.systems.base import Kind, Query, RecordKind, SystemOptions, dig
from steersman.errors import ConfigError, UnavailableError, why


class FileSystem(SystemOptions):
    """Records in a JSON file of lists by entity; see `services.gateway.systems.file_records`."""

    type: Literal["file"]
    path: str
    """The file; it is read again when it has changed."""
    kinds: dict[Kind, RecordKind]
    """Where each kind lies in it."""

    def open(self) -> FileRecords:
        return FileRecords(self)


class FileRecords:
    """See `services.gateway.systems.base.System`."""

    def __init__(self, config: FileSystem) -> None:
        self.name = config.name
        self.tenants: Sequence[str] = config.tenants
        self.kinds: Mapping[Kind, RecordKind] = config.kinds
        self._path = Path(config.path)
        self._changed = -1.0
        self._rows: dict[str, list[dict[str, Any]]] = {}
        try:
            self._read()
        except (OSError, ValueError) as error:
            raise ConfigError(f"tools.systems.{config.name}.path: {self._path} cannot be read ({why(error)})") from None

    async def fetch(self, query: Query) -> list[dict[str, Any]]:
        try:
            rows = await asyncio.to_thread(self._read)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{self.name} cannot be asked at the moment ({type(error).__name__})") from None
        kind = query.kind
        found = [
            row
            for row in reversed(rows.get(kind.entity, []))
            if (kind.owner is None or dig(row, kind.owner) == query.owner)
            and (query.number is None or _same(dig(row, kind.number), query.number))
        ]
        return found[: query.limit]

    async def close(self) -> None: ...

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        """All records by entity; ValueError for a file of another shape."""
        changed = self._path.stat().st_mtime
        if changed != self._changed:
            rows = json.loads(self._path.read_text(encoding="utf-8"))
            shaped = isinstance(rows, dict) and all(
                isinstance(several, list) and all(isinstance(row, dict) for row in several) for several in rows.values()
            )
            if not shaped:
                raise ValueError("it must be an object of lists of objects")
            self._rows, self._changed = rows, changed
        return self._rows


def _same(found: Any, asked: str) -> bool:
    return str(found).casefold() == asked.casefold()
