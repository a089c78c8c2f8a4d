"""Facts for models that cannot call tools: what the message names is looked up and put into the prompt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.answer import Lookup, Source
from services.gateway.auth.callers import Caller
from services.gateway.tools.reading import Wish
from services.gateway.tools.records import Record, Records
from steersman.errors import SteersmanError

_NOBODY = (
    "The customer who is asking is not logged in: records of customers cannot be looked up. Say so when one is needed."
)
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Facts:
    """What goes into the prompt, and what it came from."""

    context: str
    lookups: tuple[Lookup, ...]


async def look_up(
    records: Records, caller: Caller, asked: Sequence[Wish], *, instruction: str, newest: int
) -> Facts | None:
    """Facts for what a message asks for; None when it is nothing that a system could know."""
    available = records.kinds(caller.tenant)
    asked = [wish for wish in asked if wish.kind in available]
    if not asked:
        return None
    lines = [instruction] if instruction else []
    if caller.customer is None:
        if any(wish.kind != "stock" for wish in asked):
            lines.append(_NOBODY)
        asked = [wish for wish in asked if wish.kind == "stock"]
    place = asyncio.Semaphore(_AT_ONCE)

    async def find(wish: Wish) -> list[Record] | None:
        async with place:
            try:
                return await records.find(caller, wish.kind, wish.number, newest)
            except SteersmanError:
                return None

    results = await asyncio.gather(*map(find, asked))
    seen: set[Source] = set()
    lookups = [_lookup(wish, found, seen) for wish, found in zip(asked, results, strict=True)]
    lines += [lookup.text for lookup in lookups if lookup.text]
    return Facts("\n".join(lines), tuple(lookups))


def _lookup(wish: Wish, found: Sequence[Record] | None, seen: set[Source]) -> Lookup:
    """One read; None is a failed one. Records in `seen` are not shown again."""
    arguments = {"number": wish.number} if wish.number else {}
    if found is None:
        return Lookup(wish.kind, arguments, "failed", text=f"[{wish.kind}] cannot be looked up at the moment")
    if not found:
        name = f"{wish.kind} {wish.number}" if wish.number else wish.kind
        return Lookup(wish.kind, arguments, "not_found", text=f"[{name}] not found")
    sources = tuple(source_of(record) for record in found)
    text = "\n".join(describe(record) for record in found if source_of(record) not in seen)
    seen.update(sources)
    return Lookup(wish.kind, arguments, "found", sources, text)


def source_of(record: Record) -> Source:
    return Source(record.system, record.source)


def describe(record: Record) -> str:
    """One line, with its source mark and JSON values unless its kind has a sentence; no value can pose as another line,
    because `clean` leaves no line ends in it."""
    if record.sentence is not None:
        return record.sentence.format_map(
            {name: "" if value is None else value for name, value in record.fields.items()}
        )
    return f"[{record.system}:{record.source}] {json.dumps(record.fields, ensure_ascii=False, default=str)}"
