"""Templates and forms of the pages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fastapi import Request
from fastapi.responses import Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from services.gateway.auth.callers import ANONYMOUS, Scope
from services.gateway.auth.origin import current_visit
from services.gateway.errors import BadRequestError, UnsupportedMediaTypeError
from steersman.errors import PermissionDeniedError

HERE = Path(__file__).resolve().parent
_markdown = MarkdownIt("commonmark", {"html": False}).enable("table")


def _rendered(text: str) -> Markup:
    """Markdown without HTML in it."""
    return Markup(_markdown.render(text))


_templates = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)
_templates.filters["markdown"] = _rendered
_templates.filters["pretty"] = lambda value: json.dumps(value, ensure_ascii=False, indent=1)


@dataclass(frozen=True)
class Place:
    """A page that others lead to."""

    href: str
    name: str
    scope: Scope
    """What its visitor needs."""


PLACES = (
    Place("/", "Chat", "chat"),
    Place("/label", "Labelling", "label"),
    Place("/operator", "Operation", "operate"),
    Place("/keys", "Keys", "admin"),
)


def _visitor() -> dict[str, Any]:
    """Where the person at hand may go, and who it is, as far as the request's credentials were looked at."""
    caller = current_visit().caller
    if caller is None:
        return {"places": [], "person": "", "sign_in": True}
    may = [place for place in PLACES if place.scope in caller.scopes]
    if caller.key_id == ANONYMOUS:  # keys are managed with a key
        may = [place for place in may if place.scope != "admin"]
    return {"places": may, "person": "" if caller.name == ANONYMOUS else caller.name, "sign_in": True}


def render(name: str, status: int = 200, **values: Any) -> Response:
    """A page from its template; every value is escaped. The way to the other pages is there by itself."""
    text = _templates.get_template(name).render(_visitor() | values)
    return Response(text, status, headers={"cache-control": "no-store"}, media_type="text/html; charset=utf-8")


async def form_of(request: Request) -> dict[str, str]:
    """Fields of a form that was sent from one of our own pages.

    Raises:
        PermissionDeniedError: it came from a page of another site.
    """
    # Our own pages name themselves (referrer-policy: same-origin); "null" is a page that hides where it comes from.
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
    elsewhere = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    if elsewhere or site not in ("same-origin", "none"):
        raise PermissionDeniedError("The form was sent from another site; open the page here and try again")
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise UnsupportedMediaTypeError("The form must be sent as application/x-www-form-urlencoded")
    try:
        text = (await request.body()).decode()
        fields = dict(parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=200))
    except (UnicodeDecodeError, ValueError):
        raise BadRequestError("The form cannot be read; go back and try again") from None
    if any("\0" in name or "\0" in value for name, value in fields.items()):
        raise BadRequestError("The form holds a NUL character, which no database keeps; leave it out")
    return fields
