"""The gateway's side of the database; its tables are in `steersman.store.serving`."""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from steersman.store.engine import Store
from steersman.store.models import Base
from steersman.store.serving import (
    ApiKey,
    Audit,
    Conversation,
    Idempotency,
    InboxTicket,
    KeyUse,
    KeyWindow,
    ProposedAction,
    Reservation,
)

__all__ = [
    "ApiKey",
    "Audit",
    "Conversation",
    "Idempotency",
    "InboxTicket",
    "KeyUse",
    "KeyWindow",
    "ProposedAction",
    "Reservation",
    "insert_new",
    "open_store",
    "storable",
    "storable_json",
]

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def open_store(url: str) -> Store:
    """Opens the database, brought up to date."""
    return Store.open(url, brief=True)


def storable(text: str) -> str:
    """The text without what PostgreSQL cannot store: NUL and lone surrogates."""
    return _UNSTORABLE.sub("", text) if _UNSTORABLE.search(text) else text


def storable_json(value: Any) -> Any:
    """The same JSON value without what PostgreSQL cannot store."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [storable_json(item) for item in value]
    if isinstance(value, dict):
        return {storable(str(name)): storable_json(item) for name, item in value.items()}
    return value


def insert_new(session: Session, table: type[Base], row: dict[str, Any]) -> bool:
    """Inserts a row; False when its primary key is taken."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    key = sa.inspect(table).primary_key[0]
    # Not the row count: with PostgreSQL's driver it may be unknown.
    made = session.execute(insert(table).values(row).on_conflict_do_nothing().returning(key))
    return made.first() is not None
