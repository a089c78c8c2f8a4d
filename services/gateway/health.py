"""Liveness and readiness for load balancers and Kubernetes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.documentation import error_responses
from services.gateway.metrics import CONTENT_TYPE, Metrics


def health_router(assistant: Assistant, auth: Authenticator, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["Health"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", summary="Whether the process lives")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @router.head("/readyz", include_in_schema=False)
    @router.get(
        "/readyz",
        summary="Whether an answer can be given",
        responses={
            503: {"description": "No replica is ready, records cannot be stored, a task is down, or it is stopping."}
        },
    )
    async def ready() -> JSONResponse:
        replicas = {target: info is not None for target, info in assistant.models.infos.items()}
        body = {"ready": assistant.ready, "draining": assistant.draining, "replicas": replicas}
        body |= {"recording": assistant.can_record, "down": sorted(assistant.background.down)}
        body |= {"models": assistant.models.readiness}
        return JSONResponse(body, 200 if assistant.ready else 503)

    @router.get(
        "/metrics",
        summary="Prometheus metrics",
        responses={200: {"content": {"text/plain": {}}}, **error_responses(401, 403)},
    )
    async def scrape(request: Request) -> Response:
        (await auth.caller(request.headers)).require("operate")
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    return router
