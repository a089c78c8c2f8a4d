"""Running a labelling project: settings with versions, search, adjudication, assignment, retiring labelers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, get_args

import sqlalchemy as sa
from sqlalchemy.orm import Session

from steersman.errors import InvalidArgumentError, NotFoundError
from steersman.store.handing import visible
from steersman.store.judging import forget_labeler
from steersman.store.models import (
    DISPUTED,
    ITEM_STATES,
    Assignment,
    Item,
    ItemState,
    Labeler,
    Project,
    ProjectVersion,
    now,
)
from steersman.store.storable import holds_unstorable
from steersman.store.verdicts import Verdict

STATES: tuple[ItemState, ...] = get_args(ItemState)
_SETTINGS = ("guidelines", "overlap", "honeypot_every", "thresholds")


# --- settings ---------------------------------------------------------------------------------------------------


def edit_project(session: Session, project: Project, by: str, **changes: Any) -> int:
    """Changes settings and returns the version from now on; what was before stays on record.

    A new overlap opens or closes places on every item. Raises InvalidArgumentError for a wrong setting.
    """
    project = session.get_one(Project, project.id, with_for_update=True, populate_existing=True)
    unknown = changes.keys() - set(_SETTINGS)
    if unknown:
        raise InvalidArgumentError(f"{unknown.pop()}: is no setting; known are {', '.join(_SETTINGS)}")
    if changes.get("overlap", 1) < 1 or changes.get("honeypot_every", 0) < 0:
        raise InvalidArgumentError("overlap must be at least 1, honeypot_every at least 0")
    if holds_unstorable(changes):
        raise InvalidArgumentError("guidelines: hold NUL or a lone surrogate; leave it out")
    changes = {name: value for name, value in changes.items() if getattr(project, name) != value}
    if not changes:
        return project.version
    before = {name: getattr(project, name) for name in _SETTINGS}
    if project.version == 1:
        session.add(ProjectVersion(project_id=project.id, version=1, settings=before, created_at=project.created_at))
    more = changes.get("overlap", project.overlap) - project.overlap
    if more:
        session.execute(
            sa.update(Item)
            .where(Item.project_id == project.id, Item.honeypot.is_(False))
            .values(open_slots=Item.open_slots + more)
        )
    for name, value in changes.items():
        setattr(project, name, value)
    project.version += 1
    settings = before | changes
    session.add(ProjectVersion(project_id=project.id, version=project.version, settings=settings, by=by))
    session.flush()
    return project.version


def versions(session: Session, project: Project) -> list[ProjectVersion]:
    """The settings that the project had, newest first; empty while nothing was changed."""
    found = sa.select(ProjectVersion).where(ProjectVersion.project_id == project.id)
    return list(session.scalars(found.order_by(ProjectVersion.version.desc())))


# --- items ------------------------------------------------------------------------------------------------------


def get_item(session: Session, project: Project, item_id: int, tenant: str | None = None) -> Item:
    """An item of the project that the tenant may see. Raises NotFoundError."""
    item = session.scalar(sa.select(Item).where(Item.id == item_id, visible(project, tenant)).with_for_update())
    if item is None:
        raise NotFoundError(f"item {item_id} is not in project {project.name!r}")
    return item


def find_items(
    session: Session,
    project: Project,
    *,
    text: str = "",
    end_customer: str = "",
    state: ItemState = "all",
    tenant: str | None = None,
    after: tuple[float, int] | None = None,
    limit: int = 50,
) -> list[Item]:
    """Items by a part of their key or conversation, without regard to case, and by state; disputed ones first.

    Args:
        end_customer: pseudonym of the end customer whose they are; empty: anybody's.
        after: `place_of` the last item that is known already; what follows it is found at once, however many precede.
    """
    query = sa.select(Item).where(visible(project, tenant))
    if state != "all":
        query = query.where(sa.text(ITEM_STATES[state]))
    if end_customer := end_customer.replace("\0", ""):
        query = query.where(Item.meta["end_customer"].as_string() == end_customer)
    if text := text.replace("\0", ""):
        # SQLite keeps JSON with \u escapes, PostgreSQL without.
        columns = (Item.key, sa.cast(Item.prompt, sa.Text), sa.cast(Item.candidates, sa.Text))
        spellings = {text, json.dumps(text)[1:-1]}
        query = query.where(
            sa.or_(*(column.icontains(spelling, autoescape=True) for column in columns for spelling in spellings))
        )
    disputed: sa.ColumnElement[float] = sa.literal_column(DISPUTED)
    worst_first = query.order_by(disputed.desc(), Item.id)
    if after is None:
        return list(session.scalars(worst_first.limit(limit)))
    # As two ranges of the index, which no database makes of (a < x OR a = x AND id > y).
    same = query.where(disputed == after[0], Item.id > after[1]).order_by(Item.id)
    found = list(session.scalars(same.limit(limit)))
    if len(found) < limit:
        found += session.scalars(worst_first.where(disputed < after[0]).limit(limit - len(found)))
    return found


def place_of(item: Item) -> tuple[float, int]:
    """Where an item stands among those that `find_items` finds."""
    return item.disagreement or 0.0, item.id


def resolve(session: Session, project: Project, item: Item, verdict: Verdict | None, by: str) -> None:
    """Decides a disputed item: from now on this verdict holds in releases; None takes the decision back.

    What the labelers said stays, and stays in the agreement figures. Raises InvalidArgumentError.
    """
    if verdict is None:
        item.resolution, item.resolved_by, item.resolved_at = None, None, None
    else:
        if verdict.skip or item.honeypot:
            raise InvalidArgumentError("only an item that is no honeypot is decided, and by a verdict")
        verdict.check(project, len(item.candidates))
        item.resolution, item.resolved_by, item.resolved_at = verdict.to_dict(), by, now()
    session.flush()


def assign(session: Session, project: Project, labeler: Labeler, item_ids: Sequence[int]) -> int:
    """Gives items to one person, who gets them next and keeps them; returns how many were not theirs before."""
    had = set(session.scalars(sa.select(Assignment.item_id).where(Assignment.labeler_id == labeler.id)))
    items = session.scalars(
        sa.select(Item)
        .where(Item.project_id == project.id, Item.id.in_(set(item_ids) - had))
        .order_by(Item.id)
        .with_for_update()
    ).all()
    draw = random.SystemRandom()
    for item in items:
        shown = list(range(len(item.candidates)))
        draw.shuffle(shown)
        session.add(Assignment(item_id=item.id, labeler_id=labeler.id, project_id=project.id, shown=shown, held=True))
        item.open_slots -= not item.honeypot
    session.flush()
    return len(items)


# --- labelers ---------------------------------------------------------------------------------------------------


def get_labeler(session: Session, name: str, customer: str | None = None) -> Labeler:
    """A labeler by name, of whichever tenant when only one has such a name. Raises NotFoundError."""
    query = sa.select(Labeler).where(Labeler.name == name)
    found = session.scalars(query if customer is None else query.where(Labeler.customer == customer)).all()
    if len(found) != 1:
        reason = "does not exist" if not found else "is the name of several tenants' labelers; name the tenant, too"
        raise NotFoundError(f"labeler {name!r} {reason}")
    return found[0]


def retire(session: Session, labeler: Labeler, *, forget: bool = False) -> int:
    """Ends a labeler's work: what is in their hands goes to others. Returns how many verdicts were taken back.

    Args:
        session: A writing session.
        labeler: Who judges no more.
        forget: Take all their verdicts out of counts and releases, and hand the items out again.
    """
    labeler.active = False
    for assignment in session.scalars(
        sa.select(Assignment).where(Assignment.labeler_id == labeler.id, Assignment.state == "open")
    ).all():
        session.execute(
            sa.update(Item)
            .where(Item.id == assignment.item_id, Item.honeypot.is_(False))
            .values(open_slots=Item.open_slots + 1)
        )
        session.delete(assignment)
    session.flush()
    return forget_labeler(session, labeler) if forget else 0
