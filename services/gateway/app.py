"""The ASGI application: routes, error shapes and the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from services.gateway.actions import actions_router
from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.documentation import definitions, error_schemas
from services.gateway.errors import error_response, from_problems
from services.gateway.feedback import FeedbackBody, FeedbackDesk, feedback_router
from services.gateway.health import health_router
from services.gateway.inbox.router import inbox_router
from services.gateway.inbox.worker import Inboxes
from services.gateway.key_admin import KeyChange, NewKey, Rotation, keys_router
from services.gateway.metrics import Metrics
from services.gateway.middleware import Endpoint
from services.gateway.openai.documentation import BODIES
from services.gateway.openai.embeddings import EmbeddingRequest, embeddings_router
from services.gateway.openai.responses import responses_router
from services.gateway.openai.router import openai_router
from services.gateway.pages.router import PREFIXES, error_page, pages_router
from steersman import __version__
from steersman.errors import InvalidArgumentError, NotFoundError, SteersmanError
from steersman.store.engine import Store


class MethodNotAllowedError(InvalidArgumentError):
    http_status = 405


def create_app(
    assistant: Assistant,
    auth: Authenticator,
    feedback: FeedbackDesk,
    inboxes: Inboxes,
    metrics: Metrics,
    store: Store,
) -> tuple[FastAPI, dict[str, Endpoint]]:
    """The application, and the endpoints by path that `FrontMiddleware` calls directly."""
    app = FastAPI(title="Steersman gateway", version=__version__, docs_url=None, redoc_url=None)
    openai, under_kserve = (openai_routes(assistant, auth, prefix) for prefix in ("/v1", "/openai/v1"))
    app.include_router(openai)
    app.include_router(under_kserve, include_in_schema=False)
    app.include_router(feedback_router(feedback, auth))
    app.include_router(actions_router(assistant.grounding.desk, auth, assistant.recorder))
    app.include_router(keys_router(store, auth, assistant.recorder))
    app.include_router(inbox_router(inboxes))
    app.include_router(health_router(assistant, auth, metrics))
    app.include_router(pages_router(assistant, auth, store))
    _add_error_handlers(app)
    _extend_openapi(app)
    return app, {**_posts(openai), **_posts(under_kserve)}


def openai_routes(assistant: Assistant, auth: Authenticator, prefix: str) -> APIRouter:
    """OpenAI's API below a prefix."""
    router = APIRouter()
    router.include_router(openai_router(assistant, auth, prefix))
    router.include_router(responses_router(assistant, auth, prefix))
    router.include_router(embeddings_router(assistant, auth, prefix))
    return router


def _posts(router: APIRouter) -> dict[str, Endpoint]:
    routes = (route for route in router.routes if isinstance(route, APIRoute))
    whole = (route for route in routes if "{" not in route.path)
    return {route.path: route.endpoint for route in whole if route.methods == {"POST"}}


def _add_error_handlers(app: FastAPI) -> None:
    def shown(request: Request, error: SteersmanError) -> Response:
        if request.url.path.startswith(PREFIXES):
            return error_page(request, error)
        return error_response(error, path=request.url.path)

    @app.exception_handler(SteersmanError)
    async def known(request: Request, error: SteersmanError) -> Response:
        return shown(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # A place begins with where the field was: query, path, header.
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
        return shown(request, from_problems(problems))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 405:
            refusal: SteersmanError = MethodNotAllowedError(f"{request.method} is not possible at {path}")
        else:
            refusal = NotFoundError(f"There is nothing at {path}; see /openapi.json")
        response = error_response(refusal, path=path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        raise error  # FrontMiddleware logs it and answers.


_OIP_ERRORS = {
    str(status): {
        "description": "An error in the Open Inference Protocol's shape.",
        "content": {
            "application/json": {
                "schema": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
            }
        },
    }
    for status in (400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504)
}


def _extend_openapi(app: FastAPI) -> None:
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(error_schemas())
            schemas.update(definitions(*BODIES, EmbeddingRequest, FeedbackBody, KeyChange, NewKey, Rotation))
            schemas.pop("HTTPValidationError", None)
            schemas.pop("ValidationError", None)
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if path.startswith("/v2"):
                        operation["responses"].update(_OIP_ERRORS)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
