"""Liveness and readiness for load balancers and Kubernetes."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from services.gateway.answering import Assistant


def health_router(assistant: Assistant) -> APIRouter:
    router = APIRouter(tags=["Health"])

    @router.get("/healthz", summary="Whether the process lives")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @router.get(
        "/readyz",
        summary="Whether an answer can be given",
        responses={503: {"description": "No replica is ready, or the gateway is stopping."}},
    )
    async def ready() -> JSONResponse:
        replicas = {target: info is not None for target, info in assistant.pool.infos.items()}
        body = {"ready": assistant.ready, "draining": assistant.draining, "replicas": replicas}
        return JSONResponse(body, 200 if assistant.ready else 503)

    return router
