"""Conversations that the gateway remembers, each for one tenant and customer, until they expire."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from typing import Any

import sqlalchemy as sa

from services.gateway.auth.callers import Caller
from services.gateway.config import MemoryConfig
from services.gateway.errors import BadRequestError
from services.gateway.store import Conversation, storable
from steersman.store.engine import Store
from steersman.store.models import now
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest

_ID = re.compile(r"^[A-Za-z0-9_-]{1,64}$")


class Memory:
    def __init__(self, store: Store, config: MemoryConfig) -> None:
        self._store = store
        self._config = config

    async def recall(self, caller: Caller, conversation_id: str) -> list[common_pb2.Message]:
        """Earlier turns; none for a conversation that is new, expired or somebody else's."""
        if not _ID.match(conversation_id):
            raise BadRequestError(
                "conversation_id must have 1 to 64 letters, digits, '-' or '_'", param="conversation_id"
            )
        turns = await asyncio.to_thread(self._load, caller, conversation_id)
        return [common_pb2.Message(role=turn["role"], content=turn["content"]) for turn in turns]

    def row(
        self,
        caller: Caller,
        conversation_id: str,
        request: PolicyServiceChatRequest,
        answer: str,
    ) -> dict[str, Any]:
        """The conversation after an answer, as a row of `Conversation`; the oldest turns fall out."""
        spoken = [m for m in request.messages if m.role in ("user", "assistant") and m.content]
        turns = [{"role": m.role, "content": storable(m.content)} for m in spoken]
        turns.append({"role": "assistant", "content": storable(answer)})
        turns = turns[-self._config.turns :]
        return {
            "tenant": caller.tenant,
            "customer": caller.customer_id,
            "id": conversation_id,
            "turns": turns,
            "expires_at": now() + dt.timedelta(seconds=self._config.seconds),
        }

    async def forget_expired(self) -> None:
        await asyncio.to_thread(self._forget_expired)

    def _load(self, caller: Caller, conversation_id: str) -> list[dict[str, Any]]:
        with self._store.reading() as session:
            found = session.get(Conversation, (caller.tenant, caller.customer_id, conversation_id))
        return found.turns if found is not None and found.expires_at > now() else []

    def _forget_expired(self) -> None:
        with self._store.transaction() as session:
            session.execute(sa.delete(Conversation).where(Conversation.expires_at <= now()))
