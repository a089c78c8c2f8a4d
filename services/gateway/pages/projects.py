"""Pages of whoever runs a project: its items with search, one item with its verdicts and the decision, its settings."""

from __future__ import annotations

import asyncio
import csv
import io
import math
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.callers import Caller
from services.gateway.errors import BadRequestError
from services.gateway.pages.agreement import LARGEST_ID, find_project, tenant_of
from services.gateway.pages.conversations import parts
from services.gateway.pages.labelling import COMPARE, number_of, verdict_of
from services.gateway.pages.rendering import form_of, render
from steersman.data.agreement import Thresholds
from steersman.data.records import describe_validation_error
from steersman.store import interchange, managing
from steersman.store.engine import Store
from steersman.store.handing import visible
from steersman.store.judging import ensure_labeler
from steersman.store.models import Item, Judgement, Labeler, Project

T = TypeVar("T")
_PAGE = 50
_LETTERS = "ABCDEF"


def projects_router(store: Store, auth: Authenticator) -> APIRouter:
    router = APIRouter(prefix="/label/{project}")

    async def work(
        request: Request, project: str, do: Callable[[Session, Project, Caller, str | None], T], *, write: bool = False
    ) -> T:
        caller = await auth.caller(request.headers)
        caller.require("operate")
        tenant = tenant_of(auth, caller)

        def run() -> T:
            with store.transaction() if write else store.reading() as session:
                return do(session, find_project(session, project, tenant), caller, tenant)

        return await asyncio.to_thread(run)

    @router.get("/items")
    async def items(
        request: Request, project: str, q: str = "", whose: str = "", state: str = "all", after: str = ""
    ) -> Response:
        return await work(request, project, lambda s, p, c, t: _items_page(s, p, t, q, whose, state, after))

    @router.post("/items")
    async def give(request: Request, project: str) -> Response:
        form = await form_of(request)
        return await work(request, project, lambda s, p, c, t: _give(s, p, t, form), write=True)

    @router.get("/items/{item_id:int}")
    async def item(request: Request, project: str, item_id: int) -> Response:
        return await work(request, project, lambda s, p, c, t: _item_page(s, p, t, item_id), write=True)

    @router.post("/items/{item_id:int}")
    async def decide(request: Request, project: str, item_id: int) -> Response:
        form = await form_of(request)
        return await work(request, project, lambda s, p, c, t: _decide(s, p, c, t, item_id, form), write=True)

    @router.get("/settings")
    async def settings(request: Request, project: str) -> Response:
        return await work(request, project, lambda s, p, c, t: _settings_page(s, p))

    @router.post("/settings")
    async def edit(request: Request, project: str) -> Response:
        form = await form_of(request)
        return await work(request, project, lambda s, p, c, t: _edit(s, p, c, t, form), write=True)

    @router.get("/judgements.csv")
    async def judgements(request: Request, project: str) -> Response:
        return await work(request, project, lambda s, p, c, t: _csv(s, p, t))

    return router


def _items_page(
    session: Session, project: Project, tenant: str | None, q: str, whose: str, state: str, after: str
) -> Response:
    if state not in managing.STATES:
        raise BadRequestError(f"There is no state {state!r}; choose one of {', '.join(managing.STATES)}", param="state")
    found = managing.find_items(
        session,
        project,
        text=q[:200],
        end_customer=whose[:64],
        state=state,
        tenant=tenant,
        after=_place(after),
        limit=_PAGE + 1,
    )
    more = "{!r}:{}".format(*managing.place_of(found[_PAGE - 1])) if len(found) > _PAGE else ""
    asked = {"q": q, "whose": whose[:64], "state": state, "after": after}
    values: dict[str, Any] = {"asked": asked, "states": managing.STATES, "more": more}
    return render("items.html", project=project, items=found[:_PAGE], given=None, **values)


def _place(after: str) -> tuple[float, int] | None:
    """Where a page of items begins, as the page before says it: DISAGREEMENT:ID."""
    disagreement, _, item_id = after.partition(":")
    try:
        place = float(disagreement), int(item_id)
    except ValueError:
        place = math.nan, 0
    if after and not (0 <= place[0] <= 1 and 0 <= place[1] <= LARGEST_ID):
        raise BadRequestError("There is no such page; begin with the first", param="after")
    return place if after else None


def _give(session: Session, project: Project, tenant: str | None, form: dict[str, str]) -> Response:
    name = form.get("labeler", "").strip()[:200]
    if not name:
        raise BadRequestError("Say who shall get the items", param="labeler")
    q, whose, state = form.get("q", ""), form.get("whose", "")[:64], form.get("state", "all")
    if state not in managing.STATES:
        raise BadRequestError("There is no such state", param="state")
    found = managing.find_items(
        session, project, text=q[:200], end_customer=whose, state=state, tenant=tenant, limit=_PAGE
    )
    labeler = ensure_labeler(session, name, tenant or "")
    given = managing.assign(session, project, labeler, [item.id for item in found])
    asked = {"q": q, "whose": whose, "state": state, "after": ""}
    values: dict[str, Any] = {"asked": asked, "states": managing.STATES, "more": ""}
    return render("items.html", project=project, items=found, given=f"{given} items given to {name}", **values)


def _found(session: Session, project: Project, item_id: int, tenant: str | None) -> Item:
    return managing.get_item(session, project, item_id if abs(item_id) <= LARGEST_ID else -1, tenant)


def _item_page(session: Session, project: Project, tenant: str | None, item_id: int) -> Response:
    item = _found(session, project, item_id, tenant)
    rows = session.execute(
        sa.select(Judgement, Labeler)
        .join(Labeler, Labeler.id == Judgement.labeler_id)
        .where(Judgement.item_id == item.id)
        .order_by(Judgement.id)
    ).all()
    hidden = {labeler.id for _, labeler in rows if tenant is not None and labeler.customer not in ("", tenant)}
    return render(
        "item.html",
        project=project,
        item=item,
        prompt=parts(item.prompt),
        answers=[
            {"letter": _LETTERS[at], "place": at, "parts": parts(candidate["messages"])}
            for at, candidate in enumerate(item.candidates)
        ],
        verdicts=[
            {
                "labeler": "somebody else" if labeler.id in hidden else labeler.name,
                "said": describe_verdict(judgement.verdict),
                "note": judgement.verdict.get("note", ""),
                "at": judgement.created_at,
                "why": judgement.undone_why or ("undone" if judgement.undone_at else ""),
            }
            for judgement, labeler in rows
        ],
        decision=describe_verdict(item.resolution) if item.resolution else None,
        compare=COMPARE,
    )


def describe_verdict(verdict: dict[str, object]) -> str:
    """A stored verdict in a few words; answers by letter in the item's own order."""
    if verdict.get("skip"):
        return "skipped"
    said = []
    ranking = verdict.get("ranking")
    if isinstance(ranking, list):
        said.append(" > ".join(" = ".join(_LETTERS[at] for at in group) for group in ranking))
    if verdict.get("strength"):
        said.append({1: "slightly", 2: "clearly", 3: "far"}[int(str(verdict["strength"]))])
    ratings = verdict.get("ratings")
    if isinstance(ratings, dict):
        said.append(", ".join(f"{name} {value}" for name, value in ratings.items()))
    if verdict.get("edit"):
        said.append(f"better: {verdict['edit']}")
    if verdict.get("unsafe"):
        said.append("unsafe")
    return ", ".join(said)


def _decide(
    session: Session, project: Project, caller: Caller, tenant: str | None, item_id: int, form: dict[str, str]
) -> Response:
    item = _found(session, project, item_id, tenant)
    verdict = None
    if form.get("choice") != "take-back":
        verdict = verdict_of(project, form, list(range(len(item.candidates))))
    managing.resolve(session, project, item, verdict, caller.name)
    return RedirectResponse(f"/label/{project.id}/items/{item.id}", 303)


def _settings_page(session: Session, project: Project) -> Response:
    lines = "\n".join(f"{name}={value}" for name, value in project.thresholds.items())
    return render("settings.html", project=project, lines=lines, versions=managing.versions(session, project))


def _edit(session: Session, project: Project, caller: Caller, tenant: str | None, form: dict[str, str]) -> Response:
    if tenant is not None and project.customer != tenant:
        caller.require("admin")  # the settings of a shared project are those of other tenants, too
    pairs = [line.partition("=") for line in form.get("thresholds", "").splitlines() if line.strip()]
    try:
        given = {name.strip(): value.strip() for name, _, value in pairs}
        thresholds = Thresholds.model_validate(given).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise BadRequestError(f"Thresholds: {describe_validation_error(error)}", param="thresholds") from None
    overlap, every = (number_of(form, name, int) for name in ("overlap", "honeypot_every"))
    if not 1 <= overlap <= 1000 or not 0 <= every <= 1_000_000:
        raise BadRequestError("Labelers for each item: 1 to 1,000; a honeypot among: 0 to 1,000,000 tasks")
    managing.edit_project(
        session,
        project,
        caller.name,
        guidelines=form.get("guidelines", "").replace("\r\n", "\n"),
        overlap=overlap,
        honeypot_every=every,
        thresholds=thresholds,
    )
    return RedirectResponse(f"/label/{project.id}/settings", 303)


def _csv(session: Session, project: Project, tenant: str | None) -> Response:
    seen = set(session.scalars(sa.select(Item.key).where(visible(project, tenant))))
    others = sa.select(Labeler.name).where(Labeler.customer.not_in(["", tenant or ""]))
    hidden = set(session.scalars(others)) if tenant is not None else set()
    names = interchange.csv_columns(project.aspects)
    sink = io.StringIO()
    writer = csv.DictWriter(sink, names, extrasaction="ignore")
    writer.writeheader()
    for row in interchange.export_judgements(session, project, undone=True):
        if row["item"] in seen:
            name = "somebody else" if row["labeler"] in hidden else row["labeler"]
            writer.writerow(interchange.csv_row(row | {"labeler": name}))
    headers = {
        "content-disposition": f'attachment; filename="judgements-{project.id}.csv"',
        "cache-control": "no-store",
    }
    return Response(sink.getvalue(), media_type="text/csv; charset=utf-8", headers=headers)
