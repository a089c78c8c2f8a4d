"""The pages: server-rendered, no build step, nothing from other hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from services.gateway.answering import Assistant
from steersman.errors import NotFoundError

HERE = Path(__file__).resolve().parent
_STATIC = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_templates = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)


def render(name: str, status: int = 200, **values: Any) -> Response:
    """A page from its template; every value is escaped."""
    text = _templates.get_template(name).render(**values)
    return Response(text, status, headers={"cache-control": "no-store"}, media_type="text/html; charset=utf-8")


def pages_router(assistant: Assistant) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def chat_page() -> Response:
        return render("chat.html", model=assistant.config.model)

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        path = HERE / "static" / name
        media_type = _STATIC.get(path.suffix)
        if media_type is None or path.parent != HERE / "static" or not path.is_file():
            raise NotFoundError(f"There is nothing at /static/{name}")
        return FileResponse(path, media_type=f"{media_type}; charset=utf-8")

    return router
