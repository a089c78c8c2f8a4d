"""The operator's pages: traffic, latency, tokens, feedback, refusals, versions, replicas; and the audit trail."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.callers import Caller
from services.gateway.errors import BadRequestError
from services.gateway.pages.agreement import tenant_of
from services.gateway.pages.audit import ACTIONS, Search, find_lines
from services.gateway.pages.figures import SPANS, Span, operator_figures, reason
from services.gateway.pages.rendering import render
from steersman.store.engine import Store


def operator_router(assistant: Assistant, store: Store, auth: Authenticator) -> APIRouter:
    router = APIRouter(prefix="/operator")

    async def operator(request: Request) -> Caller:
        caller = await auth.caller(request.headers)
        caller.require("operate")
        return caller

    @router.get("")
    async def page(request: Request, range: str = "24h") -> Response:
        await operator(request)
        span = _span(range)

        def figures() -> dict[str, Any]:
            with store.reading() as session:
                return operator_figures(session, span, dt.datetime.now(dt.UTC))

        return render(
            "operator.html",
            model=assistant.config.model,
            ready=assistant.ready,
            running=assistant.admission.running,
            waiting=assistant.admission.waiting,
            replicas=assistant.models.infos,
            report=assistant.config.report is not None,
            span=span,
            spans=SPANS.values(),
            reason=reason,
            **await asyncio.to_thread(figures),
        )

    @router.get("/audit")
    async def audit(request: Request, q: str = "", action: str = "", range: str = "", before: int = 0) -> Response:
        caller = await operator(request)
        since = _span(range).edges(dt.datetime.now(dt.UTC))[0] if range else None
        search = Search(q.strip()[:200], action, since, before)

        def found() -> Response:
            with store.reading() as session:
                lines, more = find_lines(session, search, tenant_of(auth, caller))
                return render(
                    "audit.html", lines=lines, more=more, search=search, range=range, spans=SPANS.values(),
                    actions=ACTIONS,
                )  # fmt: skip

        return await asyncio.to_thread(found)

    return router


def _span(name: str) -> Span:
    if name not in SPANS:
        raise BadRequestError(f"There is no range {name[:20]!r}; choose one of {', '.join(SPANS)}", param="range")
    return SPANS[name]
