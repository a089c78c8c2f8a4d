"""The agreement page of a labelling project: how far labelers agree, who strays, and what blocks a release."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.orm import Session

from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.callers import Caller
from services.gateway.errors import BadRequestError
from services.gateway.pages.rendering import form_of, render
from steersman.data.agreement import AgreementReport, Thresholds
from steersman.errors import NotFoundError
from steersman.store.engine import Store
from steersman.store.judging import reopen_disputed
from steersman.store.models import Item, Project
from steersman.store.statistics import agreement_report, disputed_items

LARGEST_ID = 2**31 - 1
_PAIRS = 50
_DAYS = 60
"""Rows shown, so that the page stays readable; `steersman data agreement --json` has all."""


def agreement_router(store: Store, auth: Authenticator) -> APIRouter:
    router = APIRouter(prefix="/label")

    @router.get("/{project}/agreement")
    async def agreement(request: Request, project: str, hourly: str = "") -> Response:
        caller = await auth.caller(request.headers)
        caller.require("operate")
        return await asyncio.to_thread(_page, store, project, tenant_of(auth, caller), _cost(hourly))

    @router.post("/{project}/reopen")
    async def reopen(request: Request, project: str) -> Response:
        caller = await auth.caller(request.headers)
        caller.require("operate")
        await form_of(request)
        tenant = tenant_of(auth, caller)

        def work() -> int:
            with store.transaction() as session:
                found = find_project(session, project, tenant)
                reopen_disputed(session, found, tenant=tenant)
                return found.id

        return RedirectResponse(f"/label/{await asyncio.to_thread(work)}/agreement", 303)

    return router


def tenant_of(auth: Authenticator, caller: Caller) -> str | None:
    """Whose projects and items a caller sees; None, where no key is asked for: all."""
    return caller.tenant if auth.required else None


def find_project(session: Session, name: str, tenant: str | None) -> Project:
    """A project by its number or its name. Raises NotFoundError where there is none that the tenant may see."""
    seen = sa.true() if tenant is None else Project.customer.in_(["", tenant])
    project = session.scalar(sa.select(Project).where(Project.name == name, seen))
    if project is None and name.isascii() and name.isdigit() and int(name) <= LARGEST_ID:
        project = session.scalar(sa.select(Project).where(Project.id == int(name), seen))
    if project is None:
        raise NotFoundError("There is no such project")
    return project


def _cost(text: str) -> float | None:
    """What an hour of labelling costs, where somebody says so. Raises BadRequestError for what is no such number."""
    if not text.strip():
        return None
    try:
        cost = float(text)
    except ValueError:
        cost = -1.0
    if not 0 <= cost <= 100_000:  # NaN, too
        raise BadRequestError("The cost of an hour must be a number from 0 to 100,000", param="hourly")
    return cost


def _page(store: Store, name: str, tenant: str | None, hourly: float | None) -> Response:
    with store.reading() as session:
        project = find_project(session, name, tenant)
        report = agreement_report(session, project, tenant)
        disputed = disputed_items(session, project, tenant=tenant)
        missing = _missing(session, project, report)
    days: dict[str, list[object]] = {}
    for day in report.days:
        days.setdefault(day.question, []).append(day)
    seconds = sum((figures.seconds_per_item or 0.0) * figures.judgements for figures in report.labelers)
    given = sum(figures.judgements for figures in report.labelers)
    return render(
        "agreement.html",
        hours=seconds / 3600,
        seconds_each=seconds / given if given else None,
        hourly=hourly,
        cost_each=seconds / 3600 * hourly / given if given and hourly is not None else None,
        project=project,
        report=report,
        missing=missing,
        failures=report.failures(Thresholds.model_validate(project.thresholds)),
        pairs=sorted(report.pairs, key=lambda pair: 1.0 if pair.kappa is None else pair.kappa)[:_PAIRS],
        days={question: found[-_DAYS:] for question, found in days.items()},
        disputed=disputed,
    )


def _missing(session: Session, project: Project, report: AgreementReport) -> list[str]:
    """What is not there yet: without it, that nothing blocks a release says little."""
    items = sa.select(sa.func.count(Item.id)).where(Item.project_id == project.id, Item.honeypot.is_(False))
    waiting = items.where(Item.open_slots > 0, Item.resolved_at.is_(None))
    total, open_now = (session.scalar(count) or 0 for count in (items, waiting))
    found = []
    if not total:
        found.append(f"The project has no items: steersman data add {project.name} FILE")
    elif open_now:
        found.append(f"{open_now:,} of {total:,} items wait for more labelers (of {project.overlap} each)")
    if not report.questions and project.kind != "edit":
        found.append("No item has two votes, so agreement is unknown")
    demands = [name for name in project.thresholds if name not in ("min_common_items", "min_labelers", "min_honeypots")]
    if not demands:
        found.append("No threshold is set, so nothing could block: set some under Settings")
    return found
