"""Tickets for people: proposed by the bot, confirmed by the customer, delivered once."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import secrets
from typing import Any

import httpx
import sqlalchemy as sa

from services.gateway.auth.callers import Caller
from services.gateway.proposals import ActionName, Proposal
from services.gateway.store import ProposedAction
from services.gateway.tools.tickets import Ticket, ticket_system
from services.gateway.tools_config import HandOver
from steersman.errors import ConflictError, NotFoundError, UnavailableError
from steersman.net import guarded_client
from steersman.store.engine import Store
from steersman.store.models import now

log = logging.getLogger("steersman.gateway")


class Desk:
    def __init__(self, config: HandOver, store: Store) -> None:
        self._config = config
        self._store = store
        self._tickets = ticket_system(config)
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
        ticket = Ticket(proposal.id, proposal.action, proposal.arguments, caller.tenant, caller.customer_id, transcript)
        try:
            return await self._tickets.open(self._client, ticket)
        except (httpx.HTTPError, ValueError) as error:
            log.warning("a ticket cannot be delivered: %s", type(error).__name__)
            raise UnavailableError("The ticket system cannot be reached; confirm again later") from None

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
