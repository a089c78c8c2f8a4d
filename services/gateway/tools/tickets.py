"""Ticket systems: how a confirmed action becomes a ticket, one class a system."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from services.gateway.fetching import fetch_json
from services.gateway.tools_config import HandOver, RequestTracker, Webhook, Zammad, Zendesk
from steersman.environment import header_secret_in, secret_in

_LONGEST_NUMBER = 200
_FIELD = "tools.handOver"


@dataclass(frozen=True, slots=True)
class Ticket:
    """What people get to read."""

    id: str
    """Of the proposed action: the same ticket has the same id however often it is sent."""
    action: str
    arguments: Mapping[str, Any]
    tenant: str
    customer: str
    """Key of the customer in the business systems; empty when nobody is logged in."""
    transcript: list[dict[str, str]]

    @property
    def subject(self) -> str:
        return f"{self.action.replace('_', ' ')} ({self.customer or 'not logged in'})"

    @property
    def text(self) -> str:
        lines = [f"Customer: {self.customer or 'not logged in'}", f"Proposal: {self.id}", ""]
        lines += [f"{name}: {value}" for name, value in self.arguments.items()]
        return "\n".join([*lines, "", *(f"{turn['role']}: {turn['content']}" for turn in self.transcript)])


class TicketSystem(Protocol):
    async def open(self, client: httpx.AsyncClient, ticket: Ticket) -> str:
        """Opens the ticket and returns its number, empty where the system says none.

        Raises:
            httpx.HTTPError, ValueError: the system does not answer, or answers something else.
        """
        ...


def ticket_system(config: HandOver) -> TicketSystem:
    """Raises ConfigError when the secret of the system is not set."""
    if config.webhook is not None:
        return _Webhook(config.webhook)
    if config.zammad is not None:
        return _Zammad(config.zammad)
    if config.zendesk is not None:
        return _Zendesk(config.zendesk)
    assert config.request_tracker is not None
    return _RequestTracker(config.request_tracker)


class _Webhook:
    def __init__(self, config: Webhook) -> None:
        self._url = config.url
        self._secret = secret_in(config.secret_env, _FIELD, least=32)

    async def open(self, client: httpx.AsyncClient, ticket: Ticket) -> str:
        body = json.dumps(
            {
                "id": ticket.id,
                "action": ticket.action,
                "arguments": dict(ticket.arguments),
                "tenant": ticket.tenant,
                "customer": ticket.customer,
                "transcript": ticket.transcript,
            }
        ).encode()
        headers = {
            "content-type": "application/json",
            "x-steersman-signature": sign_webhook(self._secret, body, int(time.time())),
            # The receiver may see the same ticket twice after a timeout; the id is always the same.
            "idempotency-key": ticket.id,
        }
        answer = await _post(client, self._url, content=body, headers=headers)
        return _number(answer.get("ticket") or answer.get("id") or ticket.id[:8])


class _RequestTracker:
    """docs.bestpractical.com: RT, REST 2."""

    def __init__(self, config: RequestTracker) -> None:
        self._url = f"{config.url.rstrip('/')}/REST/2.0/ticket"
        self._queue = config.queue
        self._headers = {"authorization": f"token {header_secret_in(config.token_env, _FIELD)}"}

    async def open(self, client: httpx.AsyncClient, ticket: Ticket) -> str:
        body = {
            "Queue": self._queue,
            "Subject": ticket.subject,
            "Content": ticket.text,
            "ContentType": "text/plain",
        }
        return _number((await _post(client, self._url, json=body, headers=self._headers)).get("id", ""))


class _Zammad:
    """docs.zammad.org: API, tickets."""

    def __init__(self, config: Zammad) -> None:
        self._url = f"{config.url.rstrip('/')}/api/v1/tickets"
        self._config = config
        self._headers = {"authorization": f"Token token={header_secret_in(config.token_env, _FIELD)}"}

    async def open(self, client: httpx.AsyncClient, ticket: Ticket) -> str:
        body = {
            "title": ticket.subject,
            "group": self._config.group,
            "customer": self._config.customer,
            "article": {
                "subject": ticket.subject,
                "body": ticket.text,
                "type": "note",
                "content_type": "text/plain",
                "internal": False,
            },
        }
        answer = await _post(client, self._url, json=body, headers=self._headers)
        return _number(answer.get("number") or answer.get("id", ""))


class _Zendesk:
    """developer.zendesk.com: Ticketing API; an `Idempotency-Key` opens a ticket once however often it comes."""

    def __init__(self, config: Zendesk) -> None:
        self._url = f"{config.url.rstrip('/')}/api/v2/tickets.json"
        token = base64.b64encode(f"{config.user}/token:{secret_in(config.token_env, _FIELD)}".encode()).decode()
        self._headers = {"authorization": f"Basic {token}"}

    async def open(self, client: httpx.AsyncClient, ticket: Ticket) -> str:
        body = {
            "ticket": {
                "subject": ticket.subject,
                "comment": {"body": ticket.text},
                "external_id": ticket.id,
                "tags": ["steersman", ticket.action],
            }
        }
        answer = await _post(client, self._url, json=body, headers=self._headers | {"idempotency-key": ticket.id})
        found = answer.get("ticket")
        return _number(found.get("id", "") if isinstance(found, dict) else "")


def sign_webhook(secret: str, body: bytes, moment: int) -> str:
    """The signature that a receiver checks."""
    signature = hmac.new(secret.encode(), f"{moment}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={moment},v1={signature}"


async def _post(client: httpx.AsyncClient, url: str, **content: Any) -> dict[str, Any]:
    answer = await fetch_json(client, "POST", url, **content)
    return answer if isinstance(answer, dict) else {}


def _number(found: Any) -> str:
    return str(found)[:_LONGEST_NUMBER]
