"""Ticket systems as they call us and as they are called: one class each.

A webhook only says which ticket has something new, and who vouches for it. What was written is read from the system
itself, so that an old or odd webhook can put no words into a ticket.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import unescape
from typing import Annotated, Any, Literal, Protocol, TypeVar

import httpx
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError

from services.gateway.errors import from_validation
from services.gateway.fetching import fetch_json
from services.gateway.inbox_config import ZammadInbox, ZendeskInbox
from steersman.environment import header_secret_in, secret_in
from steersman.errors import UnauthenticatedError

M = TypeVar("M", bound=BaseModel)

_LEAST_SECRET = 16
_LONGEST_TEXT = 100_000
_TicketId = Annotated[int, Field(gt=0, lt=2**63)]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a ticket, the oldest first."""

    id: str
    role: Literal["user", "assistant"]
    """The customer, or one of the company's people."""
    public: bool
    """The customer may read it."""
    text: str
    address: str = ""
    """Where a reply by mail goes; empty: it came another way, and the system delivers by itself."""


class TicketInbox(Protocol):
    @property
    def config(self) -> ZammadInbox | ZendeskInbox: ...

    def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        """Raises UnauthenticatedError for a signature that is missing, wrong or too old."""
        ...

    def ticket_of(self, content: Any) -> int | None:
        """The ticket in which a customer wrote something; None: the webhook tells something else.

        Args:
            content: the webhook's JSON.

        Raises:
            BadRequestError: a field is missing or wrong.
        """
        ...

    async def read(self, client: httpx.AsyncClient, ticket: int) -> list[Message]:
        """All messages of a ticket.

        Raises:
            httpx.HTTPError, ValueError: the system does not answer, or answers something else.
        """
        ...

    async def write(self, client: httpx.AsyncClient, ticket: int, text: str, to: Message, *, public: bool) -> None:
        """Adds a reply to a message, or a note about it, to a ticket. Raises as `read`."""
        ...


def inbox_of(config: ZammadInbox | ZendeskInbox) -> TicketInbox:
    """Raises ConfigError when a secret of it is not set."""
    return Zammad(config) if isinstance(config, ZammadInbox) else Zendesk(config)


_Said = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
"""A text that may be null."""


class _ZammadArticle(BaseModel):
    id: _TicketId
    body: _Said = ""
    content_type: _Said = ""
    internal: bool = False
    sender: _Said = ""
    type: _Said = ""
    address: Annotated[_Said, Field(alias="from")] = ""


class _Numbered(BaseModel):
    id: _TicketId


class _ZammadHook(BaseModel):
    ticket: _Numbered
    article: _ZammadArticle | None = None


class Zammad:
    """admin-docs.zammad.org: webhook, payload; docs.zammad.org: API, ticket articles."""

    def __init__(self, config: ZammadInbox) -> None:
        self.config = config
        field = f"inboxes.{config.name}"
        self._secret = secret_in(config.secret_env, field, least=_LEAST_SECRET)
        self._headers = {"authorization": f"Token token={header_secret_in(config.token_env, field)}"}
        self._api = f"{config.url}/api/v1"

    def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        expected = hmac.new(self._secret.encode(), body, hashlib.sha1).hexdigest()
        _check_signature(headers, "x-hub-signature", f"sha1={expected}")

    def ticket_of(self, content: Any) -> int | None:
        hook = _parsed(_ZammadHook, content)
        article = hook.article
        from_customer = article is not None and article.sender == "Customer" and not article.internal
        return hook.ticket.id if from_customer else None

    async def read(self, client: httpx.AsyncClient, ticket: int) -> list[Message]:
        found = await fetch_json(
            client, "GET", f"{self._api}/ticket_articles/by_ticket/{ticket}", headers=self._headers
        )
        return [
            Message(
                str(article.id),
                "user" if article.sender == "Customer" else "assistant",
                not article.internal and article.sender != "System",
                text_of_html(article.body) if "html" in article.content_type else article.body.strip(),
                article.address if article.type == "email" else "",
            )
            for article in sorted(_ARTICLES.validate_python(found), key=lambda article: article.id)
        ]

    async def write(self, client: httpx.AsyncClient, ticket: int, text: str, to: Message, *, public: bool) -> None:
        by_mail = {"type": "email", "to": to.address} if public and to.address else {"type": "note"}
        body = {"ticket_id": ticket, "body": text, "content_type": "text/plain", "internal": not public, **by_mail}
        await fetch_json(client, "POST", f"{self._api}/ticket_articles", json=body, headers=self._headers)


_ARTICLES = TypeAdapter(list[_ZammadArticle])


class _ZendeskAuthor(BaseModel):
    is_staff: bool = False


class _ZendeskNews(BaseModel):
    is_public: bool = True
    author: _ZendeskAuthor = _ZendeskAuthor()


class _ZendeskEvent(BaseModel):
    comment: _ZendeskNews | None = None


class _ZendeskHook(BaseModel):
    type: str
    detail: _Numbered
    event: _ZendeskEvent | None = None


class _ZendeskComment(BaseModel):
    id: _TicketId
    author_id: int
    body: _Said = ""
    plain_body: _Said = ""
    public: bool


class _ZendeskUser(BaseModel):
    id: int
    role: str


class _ZendeskThread(BaseModel):
    comments: list[_ZendeskComment]
    users: list[_ZendeskUser]


class Zendesk:
    """developer.zendesk.com: webhooks, verifying and ticket events; Ticketing API, comments and tickets."""

    def __init__(self, config: ZendeskInbox) -> None:
        self.config = config
        field = f"inboxes.{config.name}"
        self._secret = secret_in(config.secret_env, field, least=_LEAST_SECRET)
        token = f"{config.user}/token:{secret_in(config.token_env, field)}"
        self._headers = {"authorization": f"Basic {base64.b64encode(token.encode()).decode()}"}
        self._api = f"{config.url}/api/v2"

    def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        moment = headers.get("x-zendesk-webhook-signature-timestamp", "")
        digest = hmac.new(self._secret.encode(), moment.encode() + body, hashlib.sha256).digest()
        _check_signature(headers, "x-zendesk-webhook-signature", base64.b64encode(digest).decode())
        try:
            age = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(moment)
        except (ValueError, TypeError):  # a time without a zone cannot be subtracted
            raise UnauthenticatedError(
                "x-zendesk-webhook-signature-timestamp must be a time as 2026-01-31T12:00:00Z"
            ) from None
        if abs(age.total_seconds()) > self.config.max_age_seconds:
            raise UnauthenticatedError(
                f"The webhook was signed {age.total_seconds():.0f} s ago, more than {self.config.max_age_seconds:g} s; "
                "send it anew, and set both clocks"
            )

    def ticket_of(self, content: Any) -> int | None:
        hook = _parsed(_ZendeskHook, content)
        news = hook.event.comment if hook.event else None
        if hook.type == "zen:event-type:ticket.created":
            return hook.detail.id
        if hook.type == "zen:event-type:ticket.comment_added" and news is not None:
            return hook.detail.id if news.is_public and not news.author.is_staff else None
        return None

    async def read(self, client: httpx.AsyncClient, ticket: int) -> list[Message]:
        # The latest 100 of up to 5000, then in the order in which they were written.
        url = f"{self._api}/tickets/{ticket}/comments.json?include=users&sort_order=desc&per_page=100"
        found = _ZendeskThread.model_validate(await fetch_json(client, "GET", url, headers=self._headers))
        staff = {user.id for user in found.users if user.role != "end-user"}
        return [
            Message(
                str(comment.id),
                "assistant" if comment.author_id in staff else "user",
                comment.public,
                (comment.plain_body or comment.body).strip(),
            )
            for comment in sorted(found.comments, key=lambda comment: comment.id)
        ]

    async def write(self, client: httpx.AsyncClient, ticket: int, text: str, to: Message, *, public: bool) -> None:
        body = {"ticket": {"comment": {"body": text, "public": public}}}
        await fetch_json(client, "PUT", f"{self._api}/tickets/{ticket}.json", json=body, headers=self._headers)


_TAG = re.compile(r"(<[^<>]*>)")
_NAME = re.compile(r"<(/?)\s*([A-Za-z][A-Za-z0-9]*)")
_LINES = frozenset(("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol"))
_UNSEEN = frozenset(("script", "style", "head", "title", "template", "blockquote"))


def text_of_html(html: str) -> str:
    """What a reader sees of a message in HTML: a line for each block, nothing of scripts, styles and quoted mail.

    Linear: the standard library's parser is not, and this is text of strangers.
    """
    parts: list[str] = []
    inside: list[str] = []
    for position, piece in enumerate(_TAG.split(html[:_LONGEST_TEXT])):
        if position % 2 == 0:
            if not inside:
                parts.append(re.sub(r"\s+", " ", piece))
            continue
        tag = _NAME.match(piece)
        name = tag[2].lower() if tag else ""
        if name in _UNSEEN:
            if tag and not tag[1]:
                inside.append(name)
            elif inside and inside[-1] == name:
                inside.pop()
        elif name in _LINES:
            parts.append("\n")
    lines = (" ".join(line.split()) for line in unescape("".join(parts)).splitlines())
    return "\n".join(line for line in lines if line)


def _check_signature(headers: Mapping[str, str], name: str, expected: str) -> None:
    given = headers.get(name, "")
    if not given:
        raise UnauthenticatedError(f"The webhook is not signed: {name} is missing; give the webhook its secret")
    if not hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode()):
        raise UnauthenticatedError(
            f"{name} is not the signature of this body; the secret must be the same on both sides"
        )


def _parsed(model: type[M], content: Any) -> M:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise from_validation(error) from None
