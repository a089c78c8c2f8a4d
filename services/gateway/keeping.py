"""Deletes what was kept long enough, in small steps, so that nobody waits for it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.orm import Session

from services.gateway.config import Keeping
from services.gateway.leases import clock
from services.gateway.store import Audit, InboxTicket
from steersman.store.engine import Store
from steersman.store.models import Answer

_STEP = 500
_MOST_STEPS = 200
"""A pass; the next one goes on."""


def forget_old(store: Store, keeping: Keeping) -> None:
    """Enforces the retention times of the configuration."""
    with store.reading() as session:
        # One gateway whose clock is wrong would delete everything.
        at = clock(session)
    answers, evidence, audit = (
        at - dt.timedelta(days=days) for days in (keeping.answer_days, keeping.evidence_days, keeping.audit_days)
    )
    _repeat(store, lambda session: _delete(session, Answer, Answer.created_at < answers))
    _repeat(store, lambda session: _delete(session, Audit, Audit.at < audit))
    _repeat(store, lambda session: _strip(session, evidence))
    with store.transaction() as session:
        session.execute(sa.delete(InboxTicket).where(InboxTicket.changed_at < answers, InboxTicket.due_at.is_(None)))


def _repeat(store: Store, step: Callable[[Session], int]) -> None:
    for _ in range(_MOST_STEPS):
        with store.transaction() as session:
            if step(session) < _STEP:
                return


def _delete(session: Session, table: type[Answer] | type[Audit], old: sa.ColumnElement[bool]) -> int:
    found = session.scalars(sa.select(table.id).where(old).limit(_STEP)).all()
    if found:
        session.execute(sa.delete(table).where(table.id.in_(found)))
    return len(found)


def _strip(session: Session, before: dt.datetime) -> int:
    """Takes the evidence off answers; their references stay."""
    holds = sa.or_(
        Answer.token_ids.is_not(None),
        Answer.logprobs.is_not(None),
        sa.cast(Answer.lookups, sa.Text).like('%"text_read"%'),
    )
    found = session.scalars(sa.select(Answer).where(Answer.created_at < before, holds).limit(_STEP)).all()
    for answer in found:
        answer.token_ids = answer.logprobs = None
        answer.lookups = [{name: v for name, v in lookup.items() if name != "text_read"} for lookup in answer.lookups]
    return len(found)
