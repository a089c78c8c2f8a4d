"""Items of a labelling project: from rows, added once, none lost without a word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from steersman.data.aspects import own_rating
from steersman.data.records import Aspects, Preference, Row
from steersman.data.splits import content_id, encode, fingerprint
from steersman.errors import InvalidArgumentError
from steersman.store.models import Item, Project
from steersman.store.storable import holds_unstorable
from steersman.store.verdicts import MAX_CANDIDATES, Verdict

_CHUNK = 2000
# What a row says of its answers; an item is judged anew.
_JUDGED = ("margin", "soft_label", "label", "aspects", "scales", "reward")


@dataclass(frozen=True)
class NewItem:
    """An item to be judged."""

    key: str
    prompt: list[dict[str, Any]]
    candidates: list[dict[str, Any]]
    """[{"messages": [...], "model": ...}]."""
    meta: dict[str, Any] = field(default_factory=dict)
    customer: str | None = None
    consent: bool | None = None
    expected: Verdict | None = None
    """Makes the item a honeypot: the verdict that is right."""


def item_of_row(row: Row, candidates: list[dict[str, Any]] | None = None) -> NewItem:
    """A canonical row as an item: its answers are the candidates unless others are given; the rest is metadata.

    Without an id of its own the key is a hash of the row's content.
    """
    data = row.to_dict()
    bits = encode(data)[1]
    prompt = data.pop("prompt", None)
    answers = [data.pop(name) for name in ("chosen", "rejected", "completion") if name in data]
    if prompt is None:
        messages = data.pop("messages")
        prompt, answers = messages[:-1], [messages[-1:]]
    return NewItem(
        key=data.pop("id", None) or content_id(bits),
        prompt=prompt,
        candidates=candidates or [{"messages": answer} for answer in answers],
        customer=data.pop("customer", None),
        consent=data.pop("consent", None),
        meta={name: value for name, value in data.items() if name not in _JUDGED},
    )


def honeypot_of_row(row: Row) -> NewItem:
    """A row as an item with a known answer: its own judgement. Raises InvalidArgumentError for a row without one."""
    if isinstance(row, Preference):
        expected = Verdict(ranking=((0,), (1,)))
    elif isinstance(row, Aspects):
        expected = Verdict(ratings={name: own_rating(name, value, row.scales) for name, value in row.aspects.items()})
    else:
        raise InvalidArgumentError(f"row {row.id}: a honeypot needs chosen and rejected, or aspects")
    return replace(item_of_row(row), expected=expected)


@dataclass
class Added:
    """What became of the items that were to be added."""

    new: int = 0
    there_already: int = 0
    """The same item, by key and content."""
    told_apart: int = 0
    """Other content under a key that was taken: added under the key and a hash."""

    def describe(self) -> str:
        """What else is to be said beside the number of new ones."""
        said = []
        if self.there_already:
            said.append(f"{self.there_already:,} are there already")
        if self.told_apart:
            said.append(f"{self.told_apart:,} had an id that other content has and got a hash behind it")
        return "; ".join(said) or ("the files hold no row" if not self.new else "")


def add_items(session: Session, project: Project, items: Iterable[NewItem]) -> int:
    """Adds items and returns how many were new; see `add`."""
    return add(session, project, items).new


def add(session: Session, project: Project, items: Iterable[NewItem]) -> Added:
    """Adds items; one that is there already, by key and content, is left as it is.

    Raises InvalidArgumentError for an item that does not fit the project, or holds what no database keeps (NUL).
    """
    added = Added()
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    for chunk in chunks(items, _CHUNK):
        rows: dict[str, dict[str, Any]] = {}
        for item in chunk:
            if holds_unstorable([item.key, item.prompt, item.candidates, item.meta, item.customer]):
                what = "holds NUL or a lone surrogate, which no database keeps"
                raise InvalidArgumentError(f"item {item.key!r}: {what}; leave it out")
        known = _contents(session, project, [item.key for item in chunk])
        # Under a key of its own, which depends on its content, an item meets nobody but itself.
        apart = {item.key: f"{item.key[:180]}#{_content(item):016x}" for item in chunk}
        known |= _contents(session, project, list(apart.values()))
        for item in chunk:
            content = _content(item)
            before = known.get(item.key)
            if before is not None and before != content:
                item = replace(item, key=f"{item.key[:180]}#{content:016x}")
                before = known.get(item.key)
                added.told_apart += before is None
            if before is not None:
                added.there_already += 1
                continue
            known[item.key] = content
            rows[item.key] = _item_row(project, item)
        if rows:
            # Another process may add the same items at this moment: each is stored once.
            statement = insert(Item).on_conflict_do_nothing(index_elements=["project_id", "key"]).returning(Item.id)
            stored = len(session.scalars(statement, list(rows.values())).all())
            added.new += stored
            added.there_already += len(rows) - stored
    return added


def _contents(session: Session, project: Project, keys: list[str]) -> dict[str, int]:
    """Key -> content of the items that are there."""
    query = sa.select(Item.key, Item.prompt, Item.candidates).where(Item.project_id == project.id, Item.key.in_(keys))
    return {key: _bits(prompt, candidates) for key, prompt, candidates in session.execute(query)}


def _content(item: NewItem) -> int:
    return _bits(item.prompt, item.candidates)


def _bits(prompt: list[Any], candidates: list[Any]) -> int:
    answers = [candidate["messages"] for candidate in candidates]
    return fingerprint(orjson.dumps([prompt, answers], option=orjson.OPT_SORT_KEYS))


def _item_row(project: Project, item: NewItem) -> dict[str, Any]:
    least, most = {"compare": (2, 2), "rank": (2, MAX_CANDIDATES)}.get(project.kind, (1, 1))
    if not least <= len(item.candidates) <= most:
        raise InvalidArgumentError(
            f"item {item.key}: {len(item.candidates)} answers; a {project.kind} project takes {least} to {most}"
        )
    if item.expected is not None:
        item.expected.check(project, len(item.candidates))
    return {
        "project_id": project.id,
        "key": item.key,
        "prompt": item.prompt,
        "candidates": item.candidates,
        "meta": item.meta,
        "customer": item.customer,
        "consent": item.consent,
        "honeypot": item.expected is not None,
        "expected": item.expected.to_dict() if item.expected else sa.null(),
        "open_slots": project.overlap,
    }


def chunks(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk
