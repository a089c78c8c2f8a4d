"""Conversations that the gateway remembers, each for one tenant and customer, until they expire."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from services.gateway.auth.callers import Caller
from services.gateway.config import MemoryConfig
from services.gateway.errors import BadRequestError
from services.gateway.leases import clock
from services.gateway.store import Conversation, storable, storable_json
from steersman.errors import NotFoundError
from steersman.rpc.conversation import from_message, to_message
from steersman.store.engine import Store
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest

_ID = re.compile(r"^[A-Za-z0-9_-]{1,64}\Z")


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
        found = await asyncio.to_thread(self._load, caller, conversation_id)
        return [to_message(turn) for turn in found.turns] if found is not None else []

    async def recall_answer(self, caller: Caller, answer_id: str) -> list[common_pb2.Message]:
        """The conversation up to an answer that was kept, and that answer.

        Raises:
            NotFoundError: there is none, or it was not kept, has expired or is somebody else's.
        """
        found = await asyncio.to_thread(self._load, caller, answer_id[:65])
        if found is None or found.kept is None:
            raise NotFoundError(
                f"There is no answer '{answer_id[:64]}' that can be continued; it was not stored, or has expired",
                details={"param": "previous_response_id", "code": "previous_response_not_found"},
            )
        return [to_message(turn) for turn in found.turns]

    async def kept(self, caller: Caller, answer_id: str) -> dict[str, Any]:
        """What `Question.keep` made of an answer; NotFoundError as `recall_answer`."""
        found = await asyncio.to_thread(self._load, caller, answer_id[:65])
        if found is None or found.kept is None:
            raise NotFoundError(f"There is no response '{answer_id[:64]}'; it was not stored, or has expired")
        return found.kept

    async def forget(self, caller: Caller, answer_id: str) -> None:
        """Deletes what was kept of an answer; NotFoundError as `recall_answer`."""
        await self.kept(caller, answer_id)
        await asyncio.to_thread(self._forget, caller, answer_id)

    def row(
        self,
        caller: Caller,
        conversation_id: str,
        request: PolicyServiceChatRequest,
        answer: str,
    ) -> dict[str, Any]:
        """The conversation after an answer, as a row of `Conversation`; the oldest turns fall out."""
        said = list(request.messages)
        if request.continue_last:
            answer = said.pop().content + answer
        spoken = [m for m in said if m.role in ("user", "assistant") and m.content]
        turns = [{"role": m.role, "content": storable(m.content)} for m in spoken]
        turns.append({"role": "assistant", "content": storable(answer)})
        return self._row(caller, conversation_id, turns)

    def answer_row(
        self,
        caller: Caller,
        answer_id: str,
        turns: Sequence[common_pb2.Message],
        kept: dict[str, Any],
    ) -> dict[str, Any]:
        """A row of `Conversation` for an answer that is kept by its own id; `turns` end with it."""
        plain = storable_json([from_message(turn) for turn in turns])
        return self._row(caller, answer_id, plain) | {"kept": storable_json(kept)}

    def _row(self, caller: Caller, conversation_id: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
        turns = turns[-self._config.turns :]
        while len(turns) > 1 and turns[0]["role"] == "tool":  # the call that it answers has fallen out
            del turns[0]
        return {
            "tenant": caller.tenant,
            "customer": caller.customer_id,
            "id": conversation_id,
            "turns": turns,
            "expires_in": dt.timedelta(seconds=self._config.seconds),
        }

    async def forget_expired(self) -> None:
        await asyncio.to_thread(self._forget_expired)

    def _load(self, caller: Caller, conversation_id: str) -> Conversation | None:
        if not _ID.match(conversation_id):
            return None
        with self._store.reading() as session:
            found = session.get(Conversation, (caller.tenant, caller.customer_id, conversation_id))
            return found if found is not None and found.expires_at > clock(session) else None

    def _forget(self, caller: Caller, conversation_id: str) -> None:
        mine = (
            Conversation.tenant == caller.tenant,
            Conversation.customer == caller.customer_id,
            Conversation.id == conversation_id,
        )
        with self._store.transaction() as session:
            session.execute(sa.delete(Conversation).where(*mine))

    def _forget_expired(self) -> None:
        with self._store.transaction() as session:
            session.execute(sa.delete(Conversation).where(Conversation.expires_at <= clock(session)))
