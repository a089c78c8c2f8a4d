"""Labelling projects: making them, recording and undoing verdicts. `handing` says who judges what next.

Every function takes the session of one `Store.transaction()`; what it did is stored when that block ends.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from steersman.errors import ConflictError, InvalidArgumentError, NotFoundError, PermissionDeniedError, meant
from steersman.store.handing import Task, visible
from steersman.store.items import (
    Added,
    NewItem,
    add,
    add_items,
    chunks,
    honeypot_of_row,
    item_of_row,
)
from steersman.store.models import Assignment, Item, Judgement, Labeler, Project, now
from steersman.store.tallies import Judged, Tallies, disagreement
from steersman.store.verdicts import KINDS, Verdict

# Items have a module of their own; whoever judges finds all that a project needs here.
__all__ = ["Added", "NewItem", "add", "add_items", "honeypot_of_row", "item_of_row"]

_CHUNK = 2000
_UNSEEN = {"synchronize_session": False}
"""Of deletions item by item: otherwise each would look at every object that the session holds."""


@dataclass(frozen=True)
class NewJudgement:
    """A verdict to be recorded."""

    item_id: int
    labeler_id: int
    verdict: Verdict
    seconds: float
    """From showing to answering."""
    event_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Chosen by the caller: sending it again changes nothing."""
    shown: Sequence[int] | None = None
    """Order in which the answers were shown; the assignment's by default."""
    created_at: dt.datetime = field(default_factory=now)


def create_project(
    session: Session,
    name: str,
    kind: str,
    *,
    guidelines: str = "",
    aspects: Sequence[str] = (),
    overlap: int = 3,
    honeypot_every: int = 0,
    thresholds: dict[str, Any] | None = None,
    customer: str = "",
) -> Project:
    """Makes a project. Raises ConflictError when the name is taken, InvalidArgumentError for a wrong setting."""
    if kind not in KINDS:
        raise InvalidArgumentError(f"kind: {kind!r} is none of {', '.join(KINDS)}{meant(kind, KINDS)}")
    if kind == "rate" and not aspects:
        raise InvalidArgumentError("aspects: a rating project needs at least one")
    if len(set(aspects)) < len(aspects) or not all(aspect.strip() for aspect in aspects):
        raise InvalidArgumentError(f"aspects: {', '.join(map(repr, aspects))}; each needs a name of its own")
    if overlap < 1 or honeypot_every < 0:
        raise InvalidArgumentError("overlap must be at least 1, honeypot_every at least 0")
    if session.scalar(sa.select(Project.id).where(Project.name == name)) is not None:
        raise ConflictError(f"project {name!r} exists already; choose another name")
    project = Project(
        name=name,
        kind=kind,
        guidelines=guidelines,
        aspects=list(aspects),
        overlap=overlap,
        honeypot_every=honeypot_every,
        thresholds=thresholds or {},
        customer=customer,
    )
    session.add(project)
    session.flush()
    return project


def get_project(session: Session, name: str) -> Project:
    project = session.scalar(sa.select(Project).where(Project.name == name))
    if project is None:
        raise NotFoundError(f"project {name!r} does not exist; `steersman data projects` lists them")
    return project


def ensure_labeler(session: Session, name: str, customer: str = "") -> Labeler:
    """The labeler of that name in a tenant, made when new; two tabs of a new one at once make one.

    Raises PermissionDeniedError for one who was retired.
    """
    found = sa.select(Labeler).where(Labeler.name == name, Labeler.customer == customer)
    labeler = session.scalar(found)
    if labeler is None:
        insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
        values = {"name": name, "customer": customer, "active": True, "created_at": now()}
        session.execute(insert(Labeler).values(values).on_conflict_do_nothing(index_elements=["customer", "name"]))
        labeler = session.scalars(found).one()
    if not labeler.active:
        raise PermissionDeniedError(f"labeler {name!r} was retired; ask whoever runs the project")
    return labeler


def record(session: Session, project: Project, judgement: NewJudgement) -> bool:
    """Stores one verdict; False when this event was stored before. See `record_many`."""
    _lock_event(session, [judgement.event_id])
    return record_many(session, project, [judgement]) == 1


def _lock_event(session: Session, event_ids: list[str]) -> None:
    """The same form sent twice at once: the second waits until the first is stored, then finds it."""
    if session.get_bind().dialect.name == "postgresql":
        for event_id in sorted(set(event_ids)):
            session.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(event_id))))


def record_many(session: Session, project: Project, judgements: Iterable[NewJudgement]) -> int:
    """Stores verdicts and returns how many were new.

    An event id that was stored before is passed over (ConflictError when it was another verdict). A further verdict
    of the same labeler on the same item replaces the earlier one, which stays in the table as undone.
    Raises NotFoundError for an unknown item, InvalidArgumentError for a verdict that does not fit the project.
    """
    return sum(_record_chunk(session, project, chunk) for chunk in chunks(judgements, _CHUNK))


def _record_chunk(session: Session, project: Project, chunk: list[NewJudgement]) -> int:
    fresh = _without_stored(session, chunk)
    ids = sorted({judgement.item_id for judgement in fresh})
    items = {
        item.id: item
        for item in session.scalars(
            sa.select(Item).where(Item.project_id == project.id, Item.id.in_(ids)).order_by(Item.id).with_for_update()
        )
    }
    current: dict[int, dict[int, Judgement]] = defaultdict(dict)
    for row in session.scalars(sa.select(Judgement).where(Judgement.item_id.in_(ids), Judgement.undone_at.is_(None))):
        current[row.item_id][row.labeler_id] = row
    assignments = {
        (row.item_id, row.labeler_id): row
        for row in session.scalars(sa.select(Assignment).where(Assignment.item_id.in_(ids)))
    }
    tallies = Tallies(project.id)
    for judgement in fresh:
        item = items.get(judgement.item_id)
        if item is None:
            raise NotFoundError(f"item {judgement.item_id} is not in project {project.name!r}")
        judgement.verdict.check(project, len(item.candidates))
        earlier = current[item.id].pop(judgement.labeler_id, None)
        if earlier is not None:
            _take_back(session, tallies, item, earlier, current[item.id].values(), "replaced")
            session.flush()  # the unique index allows one current judgement
        assignment = assignments.get((item.id, judgement.labeler_id))
        stored, assignments[item.id, judgement.labeler_id] = _store(
            session, tallies, project, item, judgement, assignment, current[item.id].values()
        )
        current[item.id][judgement.labeler_id] = stored
    for item_id, rows in current.items():
        items[item_id].disagreement = disagreement(_judged(row) for row in rows.values())
    session.flush()
    tallies.write(session)
    if len(chunk) == _CHUNK:  # a bulk load must not keep every row in memory
        judged = (row for rows in current.values() for row in rows.values())
        for loaded in (*items.values(), *assignments.values(), *judged):
            session.expunge(loaded)
    return len(fresh)


def _without_stored(session: Session, chunk: list[NewJudgement]) -> list[NewJudgement]:
    stored = {
        row.event_id: row
        for row in session.scalars(sa.select(Judgement).where(Judgement.event_id.in_([j.event_id for j in chunk])))
    }
    fresh: dict[str, NewJudgement] = {}
    for judgement in chunk:
        before = stored.get(judgement.event_id) or fresh.get(judgement.event_id)
        if before is None:
            fresh[judgement.event_id] = judgement
            continue
        verdict = before.verdict if isinstance(before.verdict, dict) else before.verdict.to_dict()
        if (before.item_id, before.labeler_id, verdict) != (
            judgement.item_id,
            judgement.labeler_id,
            judgement.verdict.to_dict(),
        ):
            raise ConflictError(f"event {judgement.event_id!r} was stored with another verdict; use a new event id")
    return list(fresh.values())


def _store(
    session: Session,
    tallies: Tallies,
    project: Project,
    item: Item,
    new: NewJudgement,
    assignment: Assignment | None,
    others: Iterable[Judgement],
) -> tuple[Judgement, Assignment]:
    counted = 0 if item.honeypot else 1
    if assignment is None:
        shown = list(new.shown if new.shown is not None else range(len(item.candidates)))
        assignment = Assignment(item_id=item.id, labeler_id=new.labeler_id, project_id=project.id, shown=shown)
        session.add(assignment)
        item.open_slots -= counted
    elif assignment.state == "skipped":
        item.open_slots -= counted
    if new.shown is not None:
        assignment.shown = list(new.shown)
    assignment.state = "skipped" if new.verdict.skip else "judged"
    row = Judgement(
        event_id=new.event_id,
        project_id=project.id,
        item_id=item.id,
        labeler_id=new.labeler_id,
        verdict=new.verdict.to_dict(),
        shown=assignment.shown,
        seconds=new.seconds,
        created_at=new.created_at,
        project_version=project.version,
    )
    session.add(row)
    if new.verdict.skip:
        item.open_slots += counted
    else:
        item.judgements += 1
    tallies.change(_judged(row), [_judged(other) for other in others], item.expected if item.honeypot else None, 1)
    return row, assignment


def _take_back(
    session: Session, tallies: Tallies, item: Item, row: Judgement, others: Iterable[Judgement], why: str
) -> None:
    row.undone_at, row.undone_why = now(), why
    if not row.verdict.get("skip"):
        item.judgements -= 1
    tallies.change(_judged(row), [_judged(other) for other in others], item.expected if item.honeypot else None, -1)


def undo(session: Session, project: Project, labeler: Labeler) -> Task | None:
    """Takes back the labeler's last verdict and puts the item into their hands again; None when there is none."""
    row = session.scalar(
        sa.select(Judgement)
        .where(Judgement.labeler_id == labeler.id, Judgement.project_id == project.id, Judgement.undone_at.is_(None))
        .order_by(Judgement.id.desc())
        .limit(1)
    )
    if row is None:
        return None
    item = session.scalars(sa.select(Item).where(Item.id == row.item_id).with_for_update()).one()
    others = session.scalars(
        sa.select(Judgement).where(Judgement.item_id == item.id, Judgement.undone_at.is_(None), Judgement.id != row.id)
    ).all()
    assignment = session.get_one(Assignment, (item.id, labeler.id))
    if assignment.state == "skipped":
        item.open_slots -= not item.honeypot
    # The open task that came after goes back, so that the undone one is shown next.
    for later in session.scalars(
        sa.select(Assignment).where(
            Assignment.labeler_id == labeler.id, Assignment.project_id == project.id, Assignment.state == "open"
        )
    ):
        session.execute(
            sa.update(Item).where(Item.id == later.item_id, ~Item.honeypot).values(open_slots=Item.open_slots + 1)
        )
        session.delete(later)
    assignment.state = "open"
    tallies = Tallies(project.id)
    _take_back(session, tallies, item, row, others, "undone")
    item.disagreement = disagreement(_judged(other) for other in others)
    session.flush()
    tallies.write(session)
    return Task(item, list(assignment.shown))


def disputed(project: Project, limit: int, tenant: str | None = None) -> sa.Select[Any]:
    """Query for the items on which labelers disagree most; honeypots and what was decided are none of them."""
    return (
        sa.select(Item)
        .where(visible(project, tenant), Item.disagreement > 0, Item.honeypot.is_(False), Item.resolved_at.is_(None))
        .order_by(Item.disagreement.desc(), Item.id)
        .limit(limit)
    )


def reopen_disputed(session: Session, project: Project, limit: int = 1000, tenant: str | None = None) -> int:
    """Asks anew about the items on which labelers disagree most; returns how many.

    Their verdicts count no longer and stay in the table as undone; anybody may judge the items again, those who judged
    before included. Honeypots and items without disagreement stay as they are.
    """
    items = session.scalars(disputed(project, limit, tenant).with_for_update()).all()
    for item in items:
        _forget(session, item, "reopened")
        session.execute(sa.delete(Assignment).where(Assignment.item_id == item.id), execution_options=_UNSEEN)
        item.disagreement = None
        item.open_slots = project.overlap
    session.flush()
    return len(items)


def forget_labeler(session: Session, labeler: Labeler) -> int:
    """Takes every verdict of a labeler out of the counts and hands the items out again; returns how many."""
    mine = sa.select(Judgement).where(Judgement.labeler_id == labeler.id, Judgement.undone_at.is_(None))
    rows = session.scalars(mine.order_by(Judgement.item_id)).all()
    for row in rows:
        item = session.scalars(sa.select(Item).where(Item.id == row.item_id).with_for_update()).one()
        others = session.scalars(
            sa.select(Judgement).where(
                Judgement.item_id == item.id, Judgement.undone_at.is_(None), Judgement.id != row.id
            )
        ).all()
        tallies = Tallies(item.project_id)
        _take_back(session, tallies, item, row, others, "retired")
        item.open_slots += not (item.honeypot or row.verdict.get("skip"))
        item.disagreement = disagreement(_judged(other) for other in others)
        session.flush()
        tallies.write(session)
    return len(rows)


def _forget(session: Session, item: Item, why: str) -> None:
    """Takes every current verdict on an item out of the counts."""
    tallies = Tallies(item.project_id)
    current = sa.select(Judgement).where(Judgement.item_id == item.id, Judgement.undone_at.is_(None))
    rows = list(session.scalars(current))
    while rows:
        row = rows.pop()
        _take_back(session, tallies, item, row, rows, why)
    tallies.write(session)
    session.flush()


def _judged(row: Judgement) -> Judged:
    return Judged(row.labeler_id, row.verdict, row.shown, row.seconds, row.created_at)


def withdraw_items(session: Session, customer: str, end_customer: str = "") -> int:
    """Deletes the items of a tenant, or of one of its end customers (pseudonym), with everything said about them, and
    takes their verdicts out of the counts."""
    count = 0
    items = sa.select(Item).where(Item.customer == customer).order_by(Item.id).with_for_update()
    if end_customer:
        items = items.where(Item.meta["end_customer"].as_string() == end_customer)
    for item in session.scalars(items).all():
        _forget(session, item, "withdrawn")
        session.execute(sa.delete(Item).where(Item.id == item.id), execution_options=_UNSEEN)
        count += 1
    return count
