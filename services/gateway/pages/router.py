"""The pages: server-rendered, no build step, nothing from other hosts."""

from __future__ import annotations

import contextlib
from typing import Any, get_args
from urllib.parse import quote, urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import SESSION_COOKIE, Authenticator
from services.gateway.auth.callers import Scope
from services.gateway.auth.keys import LARGEST_LIMIT
from services.gateway.auth.tokens import SESSION_SECONDS
from services.gateway.key_admin import administrator
from services.gateway.middleware import PAGE_POLICY
from services.gateway.pages.agreement import agreement_router
from services.gateway.pages.labelling import labelling_router
from services.gateway.pages.operator import operator_router
from services.gateway.pages.projects import projects_router
from services.gateway.pages.rendering import HERE, PLACES, form_of, render
from steersman.errors import NotFoundError, SteersmanError, UnauthenticatedError
from steersman.store.engine import Store

# Of a key, as people read them.
_LIMITS = (
    ("requests_per_minute", "Requests a minute"),
    ("tokens_per_minute", "Tokens a minute"),
    ("tokens_per_day", "Tokens a day"),
    ("tokens_per_month", "Tokens a month"),
    ("concurrent", "Answers at once"),
)
_STATIC = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Where errors are shown to people, not to programs.
PREFIXES = ("/label", "/login", "/operator", "/report", "/keys")
# A report is one file that carries its styles and pictures; it may do nothing else.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def pages_router(assistant: Assistant, auth: Authenticator, store: Store) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def chat_page(request: Request) -> Response:
        """Anybody may open it; where a key is needed the first question leads to the log-in."""
        scopes: frozenset[str] = frozenset()
        with contextlib.suppress(SteersmanError):
            scopes = (await auth.caller(request.headers)).scopes
        return chat(report=assistant.config.report is not None and "operate" in scopes, sign_in=auth.required)

    @router.get("/widget")
    async def widget_page() -> Response:
        """The chat in a frame on a page of another site; nobody is signed in there but by what that page hands over."""
        response = chat(report=False, embedded=True, places=[], person="", sign_in=False)
        response.headers["content-security-policy"] = PAGE_POLICY.format(" ".join(_embedding_sites()))
        return response

    @router.get("/widget.js")
    async def widget_script() -> Response:
        _embedding_sites()
        headers = {"cross-origin-resource-policy": "cross-origin", "cache-control": "max-age=3600"}
        return FileResponse(HERE / "static" / "widget.js", media_type="text/javascript; charset=utf-8", headers=headers)

    def chat(*, embedded: bool = False, **shown: Any) -> Response:
        config = assistant.config
        return render(
            "chat.html",
            model=config.model,
            kept=config.database is not None,
            suggestions=config.suggestions,
            embedded=embedded,
            **shown,
        )

    @router.get("/report")
    async def report(request: Request) -> Response:
        """The report of the run whose model is served, as the file that it is: without a script, closed to the rest."""
        (await auth.caller(request.headers)).require("operate")
        path = assistant.config.report
        if path is None or not path.is_file():
            raise NotFoundError(
                "There is no report of this model here; `report` of the gateway's configuration names it"
            )
        headers = {"content-security-policy": _REPORT_POLICY, "cache-control": "no-store"}
        return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)

    def _embedding_sites() -> list[str]:
        if not assistant.config.embed_origins:
            raise NotFoundError("The chat may stand on no other site here; name the site in embedOrigins")
        return assistant.config.embed_origins

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        path = HERE / "static" / name
        media_type = _STATIC.get(path.suffix)
        if media_type is None or path.parent != HERE / "static" or not path.is_file():
            raise NotFoundError(f"There is nothing at /static/{name}")
        return FileResponse(path, media_type=f"{media_type}; charset=utf-8")

    @router.get("/keys")
    async def keys(request: Request) -> Response:
        caller = await administrator(request, auth)
        scopes = [scope for scope in get_args(Scope) if scope in caller.scopes]
        return render("keys.html", tenant=caller.tenant, scopes=scopes, limits=_LIMITS, largest=LARGEST_LIMIT)

    @router.get("/login")
    async def login_page(next: str = "/") -> Response:
        return render("login.html", next=_local(next), required=auth.required, error="")

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        form = await form_of(request)
        target = _local(form.get("next", "/"))
        try:
            session = await auth.begin_session(form.get("key", ""), form.get("name", ""))
        except SteersmanError as error:
            return render("login.html", 401, next=target, required=auth.required, error=error.message)
        if target == "/":
            target = await _home(session)
        response = RedirectResponse(target, 303)
        response.set_cookie(
            SESSION_COOKIE,
            session,
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    async def _home(session: str) -> str:
        """Where somebody without a wish of his own belongs: who may not chat is here for another page."""
        scopes = (await auth.caller({"cookie": f"{SESSION_COOKIE}={session}"})).scopes
        return "/" if "chat" in scopes else next((place.href for place in PLACES if place.scope in scopes), "/")

    @router.post("/logout")
    async def log_out(request: Request) -> Response:
        await form_of(request)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(SESSION_COOKIE)
        response.headers["clear-site-data"] = '"storage"'  # conversations that the browser keeps
        return response

    # Before the labelers' own pages, whose paths are more general.
    router.include_router(agreement_router(store, auth))
    router.include_router(projects_router(store, auth))
    router.include_router(labelling_router(store, auth, lasting=assistant.config.database is not None))
    router.include_router(operator_router(assistant, store, auth))
    return router


def error_page(request: Request, error: SteersmanError) -> Response:
    """An error as a page; who is not logged in is asked to."""
    if isinstance(error, UnauthenticatedError) and request.method == "GET":
        return RedirectResponse(f"/login?next={quote(request.url.path)}", 303)
    return render("error.html", error.http_status, message=error.message, path=request.url.path)


def _local(target: str) -> str:
    """A path on this host; anything else could lead people elsewhere."""
    parts = urlsplit(target)
    good = target.startswith("/") and not target.startswith(("//", "/\\")) and not parts.netloc and not parts.scheme
    return target if good and target.isprintable() else "/"
