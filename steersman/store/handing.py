"""Who judges what next: items handed to labelers, honeypots among them, and how far each labeler is.

Every function takes the session of one `Store.transaction()`; what it did is stored when that block ends.
"""

from __future__ import annotations

import datetime as dt
import random
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from steersman.store.models import Assignment, Item, Labeler, LabelerDay, Project, now

#: An assignment that nobody answered for so long goes to somebody else.
STALE_AFTER = dt.timedelta(hours=2)


@dataclass(frozen=True)
class Task:
    """An item in a labeler's hands."""

    item: Item
    shown: list[int]


@dataclass(frozen=True)
class Progress:
    """How far a labeler is."""

    done: int
    left: int
    """Items that this labeler may still judge."""


def visible(project: Project, tenant: str | None) -> sa.ColumnElement[bool]:
    """Which items of a project a tenant's people may see: in a project of their own all, in a shared one those of their
    tenant and of none. None: somebody of no tenant, who sees all."""
    of_project = Item.project_id == project.id
    if tenant is None or project.customer == tenant:
        return of_project
    if project.customer:
        return sa.false()
    return sa.and_(of_project, sa.or_(Item.customer.is_(None), Item.customer.in_(["", tenant])))


def next_task(
    session: Session,
    project: Project,
    labeler: Labeler,
    draw: random.Random | None = None,
    *,
    tenant: str | None = None,
) -> Task | None:
    """The labeler's open task, or a new one of those that the tenant may see; None when nothing is left.

    Items that others have begun come first, so that items complete; the order of the answers is drawn at random and
    recorded with the assignment.
    """
    # Two tabs at once get the same item: the second waits here until the first one's assignment is stored.
    session.execute(sa.select(Labeler.id).where(Labeler.id == labeler.id).with_for_update())
    open_task = session.execute(
        sa.select(Assignment, Item)
        .join(Item, Item.id == Assignment.item_id)
        .where(Assignment.labeler_id == labeler.id, Assignment.project_id == project.id, Assignment.state == "open")
        .order_by(Assignment.assigned_at)
        .limit(1)
    ).first()
    if open_task is not None:
        return Task(open_task.Item, list(open_task.Assignment.shown))
    item = None
    if project.honeypot_every and _honeypot_is_due(project, labeler, _done(session, project, labeler)):
        item = _pick(session, project, labeler, tenant, honeypot=True)
    item = item or _pick(session, project, labeler, tenant, honeypot=False)
    if item is None and release_stale(session, project):
        item = _pick(session, project, labeler, tenant, honeypot=False)
    if item is None:
        return None
    shown = list(range(len(item.candidates)))
    (draw or random.SystemRandom()).shuffle(shown)
    session.add(Assignment(item_id=item.id, labeler_id=labeler.id, project_id=project.id, shown=shown))
    item.open_slots -= not item.honeypot
    session.flush()
    return Task(item, shown)


def _honeypot_is_due(project: Project, labeler: Labeler, done: int) -> bool:
    """One task of every `honeypot_every` is a honeypot, at a place in the round that nobody can count out."""
    round_, place = divmod(done, project.honeypot_every)
    return place == random.Random(f"{project.id}:{labeler.id}:{round_}").randrange(project.honeypot_every)


def _pick(session: Session, project: Project, labeler: Labeler, tenant: str | None, *, honeypot: bool) -> Item | None:
    mine = sa.select(Assignment.item_id).where(Assignment.item_id == Item.id, Assignment.labeler_id == labeler.id)
    return session.scalar(
        sa.select(Item)
        .where(
            visible(project, tenant),
            Item.honeypot == honeypot,
            Item.open_slots > 0,
            Item.resolved_at.is_(None),
            ~mine.exists(),
        )
        .order_by(Item.open_slots, Item.place, Item.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


def release_stale(session: Session, project: Project, after: dt.timedelta = STALE_AFTER) -> int:
    """Takes back assignments that nobody answered in time and returns how many."""
    stale = session.scalars(
        sa.select(Assignment).where(
            Assignment.project_id == project.id,
            Assignment.state == "open",
            Assignment.held.is_(False),
            Assignment.assigned_at < now() - after,
        )
    ).all()
    for assignment in stale:
        session.execute(sa.update(Item).where(Item.id == assignment.item_id).values(open_slots=Item.open_slots + 1))
        session.delete(assignment)
    session.flush()
    return len(stale)


def progress(session: Session, project: Project, labeler: Labeler, tenant: str | None = None) -> Progress:
    """Counts over indexes, because asking of each open item whether the labeler had it takes seconds.

    Honeypots to come are among the tasks left, so that the figures move alike for every task.
    """
    seen = visible(project, tenant)
    to_judge = (seen, Item.honeypot == sa.false(), Item.open_slots > 0, Item.resolved_at.is_(None))
    open_items = sa.select(sa.func.count(Item.id)).where(*to_judge)
    mine = sa.select(sa.func.count(Assignment.item_id)).where(
        Assignment.labeler_id == labeler.id, Assignment.project_id == project.id
    )
    with_item = mine.join(Item, Item.id == Assignment.item_id)
    had = with_item.where(*to_judge)
    held = with_item.where(Item.honeypot == sa.false(), Assignment.state == "open")
    free, taken, open_now = (session.scalar(count) or 0 for count in (open_items, had, held))
    done = _done(session, project, labeler)
    items = free - taken + open_now
    if not project.honeypot_every:
        return Progress(done, items)
    honeypots = sa.select(sa.func.count(Item.id)).where(seen, Item.honeypot == sa.true())
    judged = with_item.where(Item.honeypot == sa.true(), Assignment.state != "open")
    known, used = (session.scalar(count) or 0 for count in (honeypots, judged))
    return Progress(done, items + min(_honeypots_ahead(project, labeler, done, items), known - used))


def _honeypots_ahead(project: Project, labeler: Labeler, done: int, items: int) -> int:
    """Honeypots that are due among and at once behind the next `items` tasks that are none."""
    every, honeypots = project.honeypot_every, 0
    if every == 1:
        return items + 1
    while True:
        if done % every == 0 and items > every:  # whole rounds have one each
            rounds = items // (every - 1)
            done, items, honeypots = done + rounds * every, items - rounds * (every - 1), honeypots + rounds
        if _honeypot_is_due(project, labeler, done):
            honeypots += 1
        elif not items:
            return honeypots
        else:
            items -= 1
        done += 1


def _done(session: Session, project: Project, labeler: Labeler) -> int:
    total = session.scalar(
        sa.select(sa.func.coalesce(sa.func.sum(LabelerDay.judgements), 0)).where(
            LabelerDay.project_id == project.id, LabelerDay.labeler_id == labeler.id
        )
    )
    return int(total or 0)
