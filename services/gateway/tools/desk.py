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
from services.gateway.leases import clock, moment
from services.gateway.proposals import ActionName, Proposal
from services.gateway.store import ProposedAction
from services.gateway.tools.tickets import Ticket, ticket_system
from services.gateway.tools_config import HandOver
from steersman.errors import ConflictError, NotFoundError, UnavailableError
from steersman.net import guarded_client
from steersman.store.engine import Store

log = logging.getLogger("steersman.gateway")

_MARGIN_SECONDS = 5.0
"""Beyond what a ticket takes at most: what is being carried out for longer was begun by a gateway that died."""


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
            await asyncio.shield(asyncio.to_thread(self._end, row, "proposed", ""))
            raise
        await asyncio.shield(self._note_done(row, ticket))
        return proposal, ticket

    async def _note_done(self, row: dict[str, Any], ticket: str) -> None:
        """The ticket is there; a database that is away for a moment must not make a second one."""
        for pause in (0.5, 1.0, 2.0, None):
            try:
                await asyncio.to_thread(self._end, row, "done", ticket)
                return
            except UnavailableError:
                if pause is None:
                    raise
                await asyncio.sleep(pause)

    async def _deliver(self, caller: Caller, proposal: Proposal, transcript: list[dict[str, str]]) -> str:
        ticket = Ticket(proposal.id, proposal.action, proposal.arguments, caller.tenant, caller.customer_id, transcript)
        try:
            return await self._tickets.open(self._client, ticket)
        except (httpx.HTTPError, ValueError) as error:
            log.warning("a ticket cannot be delivered: %s", type(error).__name__)
            raise UnavailableError("The ticket system cannot be reached; confirm again later") from None

    def _insert(self, row: dict[str, Any]) -> None:
        with self._store.transaction() as session:
            old = ProposedAction.expires_at < moment(session, -dt.timedelta(days=30))
            session.execute(sa.delete(ProposedAction).where(old).execution_options(synchronize_session=False))
            until = moment(session, dt.timedelta(seconds=self._config.propose_seconds))
            session.execute(sa.insert(ProposedAction).values({**row, "expires_at": until}))

    def _begin(self, caller: Caller, action_id: str) -> dict[str, Any]:
        with self._store.transaction() as session:
            row = session.get(ProposedAction, action_id, with_for_update=True)  # two gateways may ask at once
            at = clock(session)
            mine = row is not None and (row.tenant, row.customer) == (caller.tenant, caller.customer_id)
            if row is None or not mine or (row.state == "proposed" and row.expires_at < at):
                raise NotFoundError("There is no such proposed action; it may have expired")
            if row.state == "running" and row.expires_at > at:
                raise ConflictError("The action is being carried out at this moment; ask again in some seconds")
            names = ("id", "action", "arguments", "transcript", "state", "ticket", "expires_at")
            found = {name: getattr(row, name) for name in names}
            if row.state != "done":
                # Whoever carries it out has it for so long only: he may die, or find the database away at the end.
                row.state = "running"
                row.expires_at = at + dt.timedelta(seconds=3 * self._config.seconds + _MARGIN_SECONDS)
            return found

    def _end(self, begun: dict[str, Any], state: str, ticket: str) -> None:
        """Of what `_begin` began; a proposal that was not delivered may be confirmed as long as before."""
        with self._store.transaction() as session:
            row = session.get_one(ProposedAction, begun["id"], with_for_update=True)
            if row.state == "done":  # somebody took over, and was sooner
                return
            row.state, row.ticket = state, ticket
            row.expires_at = max(begun["expires_at"], row.expires_at)
