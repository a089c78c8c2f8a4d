"""Search in the audit trail: who asked what kind of thing when, and which records were read. It holds no texts."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from services.gateway.errors import BadRequestError
from services.gateway.store import Audit

PAGE = 100
_LARGEST = 2**62
ACTIONS = ("answer", "embed", "replay", "feedback", "act", "handover", "keys", "forget", "refused")
_EXACT = (
    Audit.answer_id, Audit.request_id, Audit.key_id, Audit.customer, Audit.weights_version, Audit.outcome, Audit.origin,
)  # fmt: skip


@dataclass(frozen=True)
class Search:
    """What is looked for; empty: anything."""

    q: str = ""
    """An id, a key, a customer, a version or an outcome as the trail has it, or a part of a record's reference."""
    action: str = ""
    since: dt.datetime | None = None
    before: int = 0
    """Only lines older than this one, by id; 0: the latest."""

    def __post_init__(self) -> None:
        if self.action not in ("", *ACTIONS):
            raise BadRequestError(
                f"There is no action {self.action[:40]!r}; choose one of {', '.join(ACTIONS)}", param="action"
            )
        if "\0" in self.q:
            raise BadRequestError("The search holds a NUL character, which no database keeps; leave it out", param="q")


def find_lines(session: Session, search: Search, tenant: str | None) -> tuple[Sequence[Audit], int]:
    """A page of lines, the latest first, and the id before which the next page begins (0: there is none).

    Args:
        tenant: whose lines are seen, beside those of requests that nobody's key came with; None: all.
    """
    found = sa.select(Audit).order_by(Audit.id.desc()).limit(PAGE + 1)
    if tenant is not None:
        found = found.where(Audit.tenant.in_(["", tenant]))
    if search.action:
        found = found.where(Audit.action == search.action)
    if search.since is not None:
        found = found.where(Audit.at >= search.since)
    if search.before:
        found = found.where(Audit.id < min(search.before, _LARGEST))
    if search.q:
        exact: list[Any] = [column == search.q for column in _EXACT]
        found = found.where(sa.or_(*exact, sa.cast(Audit.records, sa.Text).contains(search.q, autoescape=True)))
    lines = session.scalars(found).all()
    return lines[:PAGE], lines[PAGE - 1].id if len(lines) > PAGE else 0
