"""Labelling pages: compare, rank, rate, edit, skip, flag, undo; keyboard first, and usable without a script."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from services.gateway.auth.authenticator import Authenticator
from services.gateway.errors import BadRequestError, from_validation
from services.gateway.pages.agreement import LARGEST_ID, find_project
from services.gateway.pages.rendering import form_of, render
from steersman.errors import NotFoundError
from steersman.store import judging
from steersman.store.engine import Store
from steersman.store.models import Assignment, Labeler, Project
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


def labelling_router(store: Store, auth: Authenticator) -> APIRouter:
    router = APIRouter(prefix="/label")

    async def in_transaction(request: Request, work: Callable[[Session, Labeler], T]) -> T:
        caller = await auth.caller(request.headers)
        caller.require("label")

        def run() -> T:
            with store.transaction() as session:
                return work(session, judging.ensure_labeler(session, caller.name))

        return await asyncio.to_thread(run)

    @router.get("")
    async def projects(request: Request) -> Response:
        operates = "operate" in (await auth.caller(request.headers)).scopes

        def work(session: Session, labeler: Labeler) -> Response:
            rows = []
            for project in session.scalars(sa.select(Project).order_by(Project.name)):
                progress = judging.progress(session, project, labeler)
                rows.append({"id": project.id, "name": project.name, "kind": project.kind, "progress": progress})
            return render("projects.html", labeler=labeler.name, projects=rows, operates=operates)

        return await in_transaction(request, work)

    @router.get("/{project_id:int}")
    async def task(request: Request, project_id: int) -> Response:
        return await in_transaction(request, lambda session, labeler: _task_page(session, project_id, labeler))

    @router.post("/{project_id:int}")
    async def judge(request: Request, project_id: int) -> Response:
        form = await form_of(request)
        await in_transaction(request, lambda session, labeler: _judge(session, project_id, labeler, form))
        return RedirectResponse(f"/label/{project_id}", 303)

    @router.post("/{project_id:int}/undo")
    async def undo(request: Request, project_id: int) -> Response:
        await form_of(request)

        def work(session: Session, labeler: Labeler) -> None:
            judging.undo(session, find_project(session, project_id), labeler)

        await in_transaction(request, work)
        return RedirectResponse(f"/label/{project_id}", 303)

    return router


def _task_page(session: Session, project_id: int, labeler: Labeler) -> Response:
    project = find_project(session, project_id)
    task = judging.next_task(session, project, labeler)
    shown = []
    if task is not None:
        for place, position in enumerate(task.shown):
            messages = task.item.candidates[position]["messages"]
            shown.append({"letter": _LETTERS[place], "place": place, "text": _said(messages)})
    return render(
        "task.html",
        project=project,
        labeler=labeler.name,
        progress=judging.progress(session, project, labeler),
        item=task.item if task is not None else None,
        answers=shown,
        compare=COMPARE,
        event_id=uuid.uuid4().hex,
        shown_at=f"{time.time():.1f}",
    )


def _said(messages: list[dict[str, Any]]) -> str:
    return "\n\n".join(str(message.get("content", "")) for message in messages)


def _judge(session: Session, project_id: int, labeler: Labeler, form: dict[str, str]) -> None:
    project = find_project(session, project_id)
    item_id = _number(form, "item_id", int)
    assignment = session.get(Assignment, (item_id, labeler.id)) if abs(item_id) <= LARGEST_ID else None
    if assignment is None or assignment.project_id != project.id:
        raise NotFoundError("This item is not assigned to you any more; go on with the next one")
    seconds = min(max(time.time() - _number(form, "shown_at", float), 0.0), 3600.0)
    judging.record(
        session,
        project,
        judging.NewJudgement(
            item_id=item_id,
            labeler_id=labeler.id,
            verdict=_verdict(project, form, list(assignment.shown)),
            seconds=seconds,
            event_id=form.get("event_id", "")[:64] or uuid.uuid4().hex,
        ),
    )


def _verdict(project: Project, form: dict[str, str], shown: list[int]) -> Verdict:
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
            places.setdefault(_number(form, f"rank{place}", int), []).append(position)
        values["ranking"] = tuple(tuple(places[rank]) for rank in sorted(places))
    elif project.kind == "rate":
        values["ratings"] = {
            aspect: _number(form, f"aspect{number}", int) for number, aspect in enumerate(project.aspects)
        }
    else:
        values["edit"] = form.get("edit", "").replace("\r\n", "\n")
    try:
        return Verdict(**values)
    except ValidationError as error:
        raise from_validation(error) from None


def _number(form: dict[str, str], name: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(form[name])
    except (KeyError, ValueError, OverflowError):
        raise BadRequestError("An answer is missing; go back and complete the form", param=name) from None
