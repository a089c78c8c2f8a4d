"""The operator's page: traffic, latency, tokens, feedback, versions, replicas."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import defaultdict
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.pages.rendering import render
from services.gateway.store import Audit
from steersman.store.engine import Store
from steersman.store.models import Answer, FeedbackEvent
from steersman.store.units import anomalies, judged_units

_HOURS = 24
_MOST_ANOMALIES = 20
_SAMPLE = 10_000
"""Latencies are of the latest answers, so that the page stays fast."""


def operator_router(assistant: Assistant, store: Store, auth: Authenticator) -> APIRouter:
    router = APIRouter(prefix="/operator")

    @router.get("")
    async def page(request: Request) -> Response:
        (await auth.caller(request.headers)).require("operate")
        figures = await asyncio.to_thread(_figures, store)
        return render(
            "operator.html",
            model=assistant.config.model,
            ready=assistant.ready,
            running=assistant.admission.running,
            waiting=assistant.admission.waiting,
            replicas=assistant.models.infos,
            hours=_HOURS,
            **figures,
        )

    return router


def _figures(store: Store) -> dict[str, Any]:
    since = dt.datetime.now(dt.UTC) - dt.timedelta(hours=_HOURS)
    with store.reading() as session:
        recent = session.execute(
            sa.select(Audit.at, Audit.outcome, Audit.first_token_milliseconds, Audit.milliseconds)
            .where(Audit.action == "answer", Audit.at >= since)
            .order_by(Audit.at.desc(), Audit.id.desc())  # along the index of `at`
            .limit(_SAMPLE)
        ).all()
        totals = session.execute(
            sa.select(sa.func.count(), sa.func.sum(Audit.prompt_tokens), sa.func.sum(Audit.completion_tokens)).where(
                Audit.action == "answer", Audit.at >= since
            )
        ).one()
        tenants = session.execute(
            sa.select(Audit.tenant, sa.func.count(), sa.func.sum(Audit.prompt_tokens + Audit.completion_tokens))
            .where(Audit.action == "answer", Audit.at >= since)
            .group_by(Audit.tenant)
            .order_by(sa.func.count().desc())
            .limit(20)
        ).all()
        versions = _versions(session, since)
        deployments = sorted({row["deployment"] for row in versions})
        judged = judged_units(session, deployments, since) if deployments else {}
        odd = anomalies(session, deployments, since)[:_MOST_ANOMALIES] if deployments else []
    good = [row for row in recent if row.outcome in ("stop", "length", "tool_calls")]
    hours: dict[dt.datetime, int] = defaultdict(int)
    for row in recent:
        hours[row.at.replace(minute=0, second=0, microsecond=0)] += 1
    outcomes: dict[str, int] = defaultdict(int)
    for row in recent:
        outcomes[row.outcome] += 1
    return {
        "answers": totals[0],
        "prompt_tokens": totals[1] or 0,
        "completion_tokens": totals[2] or 0,
        "first_token": _quantiles([row.first_token_milliseconds for row in good if row.first_token_milliseconds]),
        "duration": _quantiles([row.milliseconds for row in good]),
        "by_hour": sorted(hours.items()),
        "most": max(hours.values(), default=1),
        "outcomes": sorted(outcomes.items(), key=lambda item: -item[1]),
        "tenants": tenants,
        "versions": versions,
        "judged": sorted(judged.items()),
        "anomalies": odd,
    }


def _versions(session: Session, since: dt.datetime) -> list[dict[str, Any]]:
    """Answers and feedback by deployment and weights version."""
    # Not the bare column: to group by it SQLite would walk its index, over all answers, rather than that of the time.
    named = sa.func.coalesce(Answer.deployment, sa.literal_column("''"))
    given = session.execute(
        sa.select(named.label("deployment"), Answer.weights_version, sa.func.count())
        .where(Answer.created_at >= since)
        .group_by(named, Answer.weights_version)
        .order_by(Answer.weights_version.desc())
    ).all()
    said: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for deployment, version, kind, value, n in session.execute(
        sa.select(
            Answer.deployment,
            Answer.weights_version,
            FeedbackEvent.kind,
            sa.case((FeedbackEvent.kind == "edit", ""), else_=FeedbackEvent.value).label("said"),
            sa.func.count(),
        )
        .join(FeedbackEvent, FeedbackEvent.answer_id == Answer.id)
        .where(Answer.created_at >= since, FeedbackEvent.current, FeedbackEvent.received_at >= since)
        .group_by(Answer.deployment, Answer.weights_version, FeedbackEvent.kind, sa.literal_column("said"))
    ):
        said[deployment, version][f"{kind} {value}".strip()] = n
    return [
        {"deployment": deployment, "version": version, "answers": n, "feedback": said[deployment, version]}
        for deployment, version, n in given
    ]


def _quantiles(values: list[int]) -> dict[str, int]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {name: ordered[min(int(len(ordered) * q), len(ordered) - 1)] for name, q in (("p50", 0.5), ("p95", 0.95))}
