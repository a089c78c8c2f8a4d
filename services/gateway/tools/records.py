"""Reading business records: only the asking customer's, only the listed fields.

This is the one place where ownership is decided. `owner_value` comes from a verified token and nothing else; a query
for records with an owner cannot be built without it, and a row that comes back with another owner is dropped. What is
not there and what belongs to somebody else look the same: not found.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.gateway.auth.callers import Caller
from services.gateway.metrics import Metrics
from services.gateway.systems.base import Kind, Query, RecordKind, System, dig
from services.gateway.tools.reading import Reader
from steersman.errors import SteersmanError

log = logging.getLogger("steersman.gateway")

NUMBER = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,39}$")
_LONGEST_TEXT = 300
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]+")


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the customer who asks."""

    system: str
    kind: Kind
    number: str
    fields: Mapping[str, Any]
    sentence: str | None = None
    """How it reads to the model; None: as JSON."""

    @property
    def source(self) -> str:
        return f"{self.kind}/{self.number}"


def query_for(kind: RecordKind, number: str | None, owner_value: str | None, limit: int) -> Query | None:
    """The query with its ownership filter; None when nothing may be asked."""
    if kind.owner is not None and not owner_value:
        return None
    return Query(kind, number, owner_value if kind.owner is not None else None, limit)


def belongs(kind: RecordKind, row: Mapping[str, Any], owner_value: str | None) -> bool:
    """Whether a row is the customer's, by what the system itself says."""
    return kind.owner is None or (bool(owner_value) and dig(row, kind.owner) == owner_value)


class Records:
    """All systems together."""

    def __init__(self, systems: Sequence[System], metrics: Metrics) -> None:
        self._systems = list(systems)
        self._metrics = metrics
        self._readers: dict[tuple[str, ...], Reader] = {}

    def __bool__(self) -> bool:
        return bool(self._systems)

    def reader(self, tenant: str) -> Reader:
        """Reads this tenant's messages: with the words and numbers of the systems that he may ask."""
        systems = self._allowed(tenant)
        key = tuple(system.name for system in systems)
        if key not in self._readers:
            words: defaultdict[Kind, list[str]] = defaultdict(list)
            numbers: defaultdict[Kind, list[str]] = defaultdict(list)
            for kind, record_kind in (entry for system in systems for entry in system.kinds.items()):
                words[kind] += record_kind.words
                # Where one system takes any number for a kind, the patterns of another must not narrow that.
                numbers[kind] += record_kind.numbers or [".*"]
            patterns = {kind: found for kind, found in numbers.items() if ".*" not in found}
            self._readers[key] = Reader(words, patterns)
        return self._readers[key]

    def kinds(self, tenant: str) -> set[Kind]:
        return {kind for system in self._allowed(tenant) for kind in system.kinds}

    async def find(self, caller: Caller, kind: Kind, number: str | None, limit: int = 3) -> list[Record]:
        """Records of this kind that the caller's customer owns; empty means not found.

        Raises:
            UnavailableError: no system could be asked.
        """
        if number is not None and not NUMBER.match(number):
            return []
        found: list[Record] = []
        failure: SteersmanError | None = None
        for system in self._allowed(caller.tenant):
            record_kind = system.kinds.get(kind)
            if record_kind is None:
                continue
            owner = caller.customer.id if caller.customer else None
            wanted = owner if kind == "customer" else number
            if wanted is None and record_kind.newest_first is None:
                continue
            query = query_for(record_kind, wanted, owner, limit)
            if query is None:
                self._metrics.lookups.labels(system.name, "no_customer").inc()
                continue
            try:
                rows = await system.fetch(query)
            except SteersmanError as error:
                log.warning("a business system failed: %s", error, extra={"system": system.name})
                self._metrics.lookups.labels(system.name, "failed").inc()
                failure = error
                continue
            rows = [row for row in rows if belongs(record_kind, row, owner)]
            self._metrics.lookups.labels(system.name, "found" if rows else "not_found").inc()
            found.extend(_record(system.name, kind, record_kind, row) for row in rows[:limit])
        if not found and failure is not None:
            raise failure
        return found

    def _allowed(self, tenant: str) -> list[System]:
        return [system for system in self._systems if not system.tenants or tenant in system.tenants]

    async def close(self) -> None:
        for system in self._systems:
            await system.close()


def _record(system: str, kind: Kind, record_kind: RecordKind, row: Mapping[str, Any]) -> Record:
    fields = {name: clean(dig(row, path)) for name, path in record_kind.fields.items()}
    return Record(system, kind, str(clean(dig(row, record_kind.number))), fields, record_kind.sentence)


def clean(value: Any) -> Any:
    """A value as plain data: text without control and invisible characters, and not too long."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): clean(each) for key, each in list(value.items())[:20]}
    if isinstance(value, (list, tuple)):
        return [clean(each) for each in value[:20]]
    text = visible(str(value))
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"


def visible(text: str) -> str:
    """One line of text, without control and invisible characters."""
    return _CONTROL.sub(" ", text).strip()
