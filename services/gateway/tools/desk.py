"""Tickets for people: proposed by the bot, confirmed by the customer, delivered once."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import sqlalchemy as sa

from services.gateway.auth.callers import Caller
from services.gateway.fetching import fetch_json
from services.gateway.store import ProposedAction
from services.gateway.tools.config import HandOver
from steersman.errors import ConfigError, ConflictError, NotFoundError, UnavailableError
from steersman.net import guarded_client
from steersman.store.engine import Store
from steersman.store.models import now

log = logging.getLogger("steersman.gateway")

_LONGEST_TICKET = 200
ActionName = Literal["hand_over", "request_return"]
PROPOSALS: dict[ActionName, str] = {
    "hand_over": "I can hand this conversation over to a colleague. Please confirm, and I open a ticket for you.",
    "request_return": "I can ask for the return of order {order}. Please confirm, and I open a ticket for it.",
}
DONE: dict[ActionName, str] = {
    "hand_over": "I have handed this conversation over to a colleague: ticket {ticket}.",
    "request_return": "I have asked for the return of order {order}: ticket {ticket}.",
}


@dataclass(frozen=True, slots=True)
class Proposal:
    """An action that waits for its confirmation."""

    id: str
    action: ActionName
    arguments: dict[str, Any]

    @property
    def text(self) -> str:
        return PROPOSALS[self.action].format(**self.arguments)

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "action": self.action, "arguments": self.arguments, "text": self.text}


class Desk:
    def __init__(self, config: HandOver, store: Store) -> None:
        self._config = config
        self._store = store
        self._secret = self._token = ""
        if config.webhook is not None:
            self._secret = _environment(config.webhook.secret_env, 32)
        if config.request_tracker is not None:
            self._token = _environment(config.request_tracker.token_env, 1)
        self._client = guarded_client(timeout=config.seconds)

    async def close(self) -> None:
        await self._client.aclose()

    async def propose(
        self, caller: Caller, action: ActionName, arguments: dict[str, Any], transcript: list[dict[str, str]]
    ) -> Proposal:
        """Stores what would be done; nothing is written anywhere else."""
        proposal = Proposal(secrets.token_urlsafe(16), action, arguments)
        row = {
            "id": proposal.id,
            "tenant": caller.tenant,
            "customer": caller.customer_id,
            "action": action,
            "arguments": arguments,
            "transcript": transcript,
            "state": "proposed",
            "ticket": "",
            "expires_at": now() + dt.timedelta(seconds=self._config.propose_seconds),
        }
        await asyncio.to_thread(self._insert, row)
        return proposal

    async def confirm(self, caller: Caller, action_id: str) -> tuple[Proposal, str]:
        """Delivers a proposed action once and returns it with its ticket; confirming again returns the same.

        Raises:
            PermissionDeniedError: without the scope `act`.
            NotFoundError: no such proposal of this customer, or it has expired.
            ConflictError: it is being delivered at this moment.
            UnavailableError: the ticket system does not answer; confirm again later.
        """
        caller.require("act")
        row = await asyncio.to_thread(self._begin, caller, action_id)
        proposal = Proposal(row["id"], row["action"], row["arguments"])
        if row["state"] == "done":
            return proposal, row["ticket"]
        try:
            ticket = await self._deliver(caller, proposal, row["transcript"])
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._set_state, action_id, "proposed", ""))
            raise
        await asyncio.to_thread(self._set_state, action_id, "done", ticket)
        return proposal, ticket

    async def _deliver(self, caller: Caller, proposal: Proposal, transcript: list[dict[str, str]]) -> str:
        if self._config.webhook is not None:
            return await self._post_webhook(caller, proposal, transcript)
        return await self._create_ticket(caller, proposal, transcript)

    async def _post_webhook(self, caller: Caller, proposal: Proposal, transcript: list[dict[str, str]]) -> str:
        assert self._config.webhook is not None
        body = json.dumps(
            {
                "id": proposal.id,
                "action": proposal.action,
                "arguments": proposal.arguments,
                "tenant": caller.tenant,
                "customer": caller.customer_id,
                "transcript": transcript,
            }
        ).encode()
        headers = {
            "content-type": "application/json",
            "x-steersman-signature": sign_webhook(self._secret, body, int(time.time())),
            # The receiver may see the same ticket twice after a timeout; the id is always the same.
            "idempotency-key": proposal.id,
        }
        answer = await self._send("POST", self._config.webhook.url, content=body, headers=headers)
        return str(answer.get("ticket") or answer.get("id") or proposal.id[:8])[:_LONGEST_TICKET]

    async def _create_ticket(self, caller: Caller, proposal: Proposal, transcript: list[dict[str, str]]) -> str:
        tracker = self._config.request_tracker
        assert tracker is not None
        lines = [f"Customer: {caller.customer_id or 'not logged in'}", f"Proposal: {proposal.id}", ""]
        lines += [f"{name}: {value}" for name, value in proposal.arguments.items()]
        lines += ["", *(f"{turn['role']}: {turn['content']}" for turn in transcript)]
        body = {
            "Queue": tracker.queue,
            "Subject": f"{proposal.action.replace('_', ' ')} ({caller.customer_id or 'not logged in'})",
            "Content": "\n".join(lines),
            "ContentType": "text/plain",
        }
        headers = {"authorization": f"token {self._token}"}
        answer = await self._send("POST", f"{tracker.url.rstrip('/')}/REST/2.0/ticket", json=body, headers=headers)
        return str(answer.get("id", ""))[:_LONGEST_TICKET]

    async def _send(self, method: str, url: str, **content: Any) -> dict[str, Any]:
        try:
            answer = await fetch_json(self._client, method, url, **content)
        except (httpx.HTTPError, ValueError) as error:
            log.warning("a ticket cannot be delivered: %s", type(error).__name__)
            raise UnavailableError("The ticket system cannot be reached; confirm again later") from None
        return answer if isinstance(answer, dict) else {}

    def _insert(self, row: dict[str, Any]) -> None:
        with self._store.transaction() as session:
            session.execute(sa.delete(ProposedAction).where(ProposedAction.expires_at < now() - dt.timedelta(days=30)))
            session.execute(sa.insert(ProposedAction).values(row))

    def _begin(self, caller: Caller, action_id: str) -> dict[str, Any]:
        with self._store.transaction() as session:
            row = session.get(ProposedAction, action_id)
            mine = row is not None and (row.tenant, row.customer) == (caller.tenant, caller.customer_id)
            if row is None or not mine or (row.state == "proposed" and row.expires_at < now()):
                raise NotFoundError("There is no such proposed action; it may have expired")
            if row.state == "running" and row.expires_at > now():
                raise ConflictError("The action is being carried out at this moment; ask again in some seconds")
            found = {
                name: getattr(row, name) for name in ("id", "action", "arguments", "transcript", "state", "ticket")
            }
            if row.state != "done":
                row.state = "running"
            return found

    def _set_state(self, action_id: str, state: str, ticket: str) -> None:
        with self._store.transaction() as session:
            row = session.get_one(ProposedAction, action_id)
            row.state, row.ticket = state, ticket


def sign_webhook(secret: str, body: bytes, moment: int) -> str:
    """The signature that a receiver checks."""
    signature = hmac.new(secret.encode(), f"{moment}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={moment},v1={signature}"


def _environment(name: str, least: int) -> str:
    value = os.environ.get(name, "")
    if len(value) < least:
        raise ConfigError(f"tools.handOver: the environment variable {name} must hold at least {least} characters")
    return value
