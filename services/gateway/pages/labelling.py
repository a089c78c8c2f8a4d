"""Labelling pages: compare, rank, rate, edit, skip, flag, undo; keyboard first, and usable without a script."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from services.gateway.auth.authenticator import Authenticator
from services.gateway.errors import BadRequestError, from_validation
from services.gateway.pages.agreement import LARGEST_ID, find_project, tenant_of
from services.gateway.pages.conversations import parts, said
from services.gateway.pages.rendering import form_of, render
from steersman.errors import NotFoundError
from steersman.store import handing, judging
from steersman.store.engine import Store
from steersman.store.models import Assignment, Item, Judgement, Labeler, Project
from steersman.store.statistics import agreement_report
from steersman.store.verdicts import Verdict

T = TypeVar("T")
_LETTERS = "ABCDEF"
# Seven answers from left to right: name, strength, label, key.
COMPARE = [
    ("left", 3, "A is far better", "1"),
    ("left", 2, "A is clearly better", "2"),
    ("left", 1, "A is slightly better", "3"),
    ("tie", 0, "Equally good", "4"),
    ("right", 1, "B is slightly better", "5"),
    ("right", 2, "B is clearly better", "6"),
    ("right", 3, "B is far better", "7"),
]


@dataclass(frozen=True)
class At:
    """Who works, on whose items, in one transaction."""

    session: Session
    labeler: Labeler
    tenant: str | None

    def project(self, name: str) -> Project:
        return find_project(self.session, name, self.tenant)


def labelling_router(store: Store, auth: Authenticator, *, lasting: bool) -> APIRouter:
    """The pages of labelers. `lasting`: what they judge outlives the gateway."""
    router = APIRouter(prefix="/label")

    async def in_transaction(request: Request, work: Callable[[At], T]) -> T:
        caller = await auth.caller(request.headers)
        caller.require("label")
        tenant = tenant_of(auth, caller)

        def run() -> T:
            with store.transaction() as session:
                return work(At(session, judging.ensure_labeler(session, caller.name, tenant or ""), tenant))

        return await asyncio.to_thread(run)

    @router.get("")
    async def projects(request: Request) -> Response:
        operates = "operate" in (await auth.caller(request.headers)).scopes

        def work(at: At) -> Response:
            rows = []
            seen = sa.true() if at.tenant is None else Project.customer.in_(["", at.tenant])
            for project in at.session.scalars(sa.select(Project).where(seen).order_by(Project.name)):
                progress = handing.progress(at.session, project, at.labeler, at.tenant)
                rows.append({"id": project.id, "name": project.name, "kind": project.kind, "progress": progress})
            return render("projects.html", labeler=at.labeler.name, projects=rows, operates=operates, lasting=lasting)

        return await in_transaction(request, work)

    @router.get("/{project}")
    async def task(request: Request, project: str) -> Response:
        return await in_transaction(request, lambda at: _task_page(at, at.project(project)))

    @router.get("/{project}/me")
    async def me(request: Request, project: str) -> Response:
        return await in_transaction(request, lambda at: _own_page(at, at.project(project)))

    @router.post("/{project}")
    async def judge(request: Request, project: str) -> Response:
        form = await form_of(request)
        await in_transaction(request, lambda at: _judge(at, at.project(project), form))
        return RedirectResponse(f"/label/{quote(project, safe='')}", 303)

    @router.post("/{project}/undo")
    async def undo(request: Request, project: str) -> Response:
        await form_of(request)
        await in_transaction(request, lambda at: judging.undo(at.session, at.project(project), at.labeler))
        return RedirectResponse(f"/label/{quote(project, safe='')}", 303)

    return router


def _task_page(at: At, project: Project) -> Response:
    task = handing.next_task(at.session, project, at.labeler, tenant=at.tenant)
    shown = []
    if task is not None:
        for place, position in enumerate(task.shown):
            messages = task.item.candidates[position]["messages"]
            shown.append({"letter": _LETTERS[place], "place": place, "text": said(messages), "parts": parts(messages)})
    return render(
        "task.html",
        project=project,
        labeler=at.labeler.name,
        progress=handing.progress(at.session, project, at.labeler, at.tenant),
        item=task.item if task is not None else None,
        prompt=parts(task.item.prompt) if task is not None else [],
        answers=shown,
        compare=COMPARE,
        event_id=uuid.uuid4().hex,
        shown_at=f"{time.time():.1f}",
    )


def _own_page(at: At, project: Project) -> Response:
    """How one labeler does: figures of their own, and which of their verdicts were asked again."""
    report = agreement_report(at.session, project)
    names = {at.labeler.name}
    own = next((figures for figures in report.labelers if figures.labeler in names), None)
    again = at.session.execute(
        sa.select(Judgement, Item)
        .join(Item, Item.id == Judgement.item_id)
        .where(
            Judgement.labeler_id == at.labeler.id,
            Judgement.project_id == project.id,
            Judgement.undone_why.in_(["reopened", "retired"]),
        )
        .order_by(Judgement.undone_at.desc())
        .limit(100)
    ).all()
    return render("own.html", project=project, labeler=at.labeler.name, own=own, again=again, report=report)


def _judge(at: At, project: Project, form: dict[str, str]) -> None:
    item_id = number_of(form, "item_id", int)
    assignment = at.session.get(Assignment, (item_id, at.labeler.id)) if abs(item_id) <= LARGEST_ID else None
    if assignment is None or assignment.project_id != project.id:
        raise NotFoundError("This item is not assigned to you any more; go on with the next one")
    seconds = min(max(time.time() - number_of(form, "shown_at", float), 0.0), 3600.0)
    judging.record(
        at.session,
        project,
        judging.NewJudgement(
            item_id=item_id,
            labeler_id=at.labeler.id,
            verdict=verdict_of(project, form, list(assignment.shown)),
            seconds=seconds,
            event_id=form.get("event_id", "")[:64] or uuid.uuid4().hex,
        ),
    )


def verdict_of(project: Project, form: dict[str, str], shown: list[int]) -> Verdict:
    """From what was clicked, in the order shown, to the verdict, in the item's order."""
    values: dict[str, Any] = {"note": form.get("note", "")[:2000], "unsafe": "unsafe" in form}
    if form.get("choice") == "skip":
        values["skip"] = True
    elif project.kind == "compare":
        side, _, strength = form.get("choice", "").partition(":")
        left, right = shown
        groups = {"left": ((left,), (right,)), "right": ((right,), (left,)), "tie": ((left, right),)}
        if side not in groups:
            raise BadRequestError("Choose which answer is better, or skip")
        values["ranking"] = groups[side]
        values["strength"] = int(strength) if side != "tie" and strength.isdigit() else None
    elif project.kind == "rank":
        places: dict[int, list[int]] = {}
        for place, position in enumerate(shown):
            places.setdefault(number_of(form, f"rank{place}", int), []).append(position)
        values["ranking"] = tuple(tuple(places[rank]) for rank in sorted(places))
    elif project.kind == "rate":
        values["ratings"] = {
            aspect: number_of(form, f"aspect{number}", int) for number, aspect in enumerate(project.aspects)
        }
    else:
        values["edit"] = form.get("edit", "").replace("\r\n", "\n")
    try:
        return Verdict(**values)
    except ValidationError as error:
        raise from_validation(error) from None


def number_of(form: dict[str, str], name: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(form[name])
    except (KeyError, ValueError, OverflowError):
        raise BadRequestError("An answer is missing; go back and complete the form", param=name) from None
