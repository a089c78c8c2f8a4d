"""The agreement page of a labelling project: how far labelers agree, who strays, and what blocks a release."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.orm import Session

from services.gateway.auth.authenticator import Authenticator
from services.gateway.pages.rendering import form_of, render
from steersman.data.agreement import Thresholds
from steersman.errors import NotFoundError
from steersman.store.engine import Store
from steersman.store.judging import reopen_disputed
from steersman.store.models import Project
from steersman.store.statistics import agreement_report, disputed_items

LARGEST_ID = 2**31 - 1
_PAIRS = 50
_DAYS = 60
"""Rows shown, so that the page stays readable; `steersman data agreement --json` has all."""


def agreement_router(store: Store, auth: Authenticator) -> APIRouter:
    router = APIRouter(prefix="/label")

    @router.get("/{project_id:int}/agreement")
    async def agreement(request: Request, project_id: int) -> Response:
        (await auth.caller(request.headers)).require("operate")
        return await asyncio.to_thread(_page, store, project_id)

    @router.post("/{project_id:int}/reopen")
    async def reopen(request: Request, project_id: int) -> Response:
        (await auth.caller(request.headers)).require("operate")
        await form_of(request)

        def work() -> None:
            with store.transaction() as session:
                reopen_disputed(session, find_project(session, project_id))

        await asyncio.to_thread(work)
        return RedirectResponse(f"/label/{project_id}/agreement", 303)

    return router


def find_project(session: Session, project_id: int) -> Project:
    """Raises NotFoundError where there is none; databases refuse larger integers with an error of their own."""
    project = session.get(Project, project_id) if project_id <= LARGEST_ID else None
    if project is None:
        raise NotFoundError("There is no such project")
    return project


def _page(store: Store, project_id: int) -> Response:
    with store.reading() as session:
        project = find_project(session, project_id)
        report = agreement_report(session, project)
        disputed = disputed_items(session, project)
    days: dict[str, list[object]] = {}
    for day in report.days:
        days.setdefault(day.question, []).append(day)
    return render(
        "agreement.html",
        project=project,
        report=report,
        failures=report.failures(Thresholds.model_validate(project.thresholds)),
        pairs=sorted(report.pairs, key=lambda pair: 1.0 if pair.kappa is None else pair.kappa)[:_PAIRS],
        days={question: found[-_DAYS:] for question, found in days.items()},
        disputed=disputed,
    )
