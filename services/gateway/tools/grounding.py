"""Puts facts from business systems under an answer: by lookup before it, or by tool calls in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from services.gateway.answer import Answer
from services.gateway.metrics import Metrics
from services.gateway.store import storable
from services.gateway.tools.config import ODataSystem, ToolsConfig, TrytonSystem
from services.gateway.tools.desk import Desk
from services.gateway.tools.lookup import look_up, wants_human, wishes
from services.gateway.tools.mcp_client import McpConnection
from services.gateway.tools.odata import OData
from services.gateway.tools.records import Records, System
from services.gateway.tools.toolbox import Toolbox
from services.gateway.tools.tryton import Tryton
from steersman.store.engine import Store
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse

Generate = Callable[[PolicyServiceChatRequest], AsyncGenerator[PolicyServiceChatResponse, None]]
_TURNS_LOOKED_AT = 3


class Grounding:
    def __init__(self, config: ToolsConfig, store: Store, metrics: Metrics) -> None:
        self._config = config
        systems: list[System] = []
        for system in config.systems:
            if isinstance(system, TrytonSystem):
                systems.append(Tryton(system))
            elif isinstance(system, ODataSystem):
                systems.append(OData(system))
        self.records = Records(systems, metrics)
        self.connections = [McpConnection(server) for server in config.mcp_servers]
        self.desk = Desk(config.hand_over, store) if config.hand_over is not None else None
        self.toolbox = Toolbox(self.records, self.connections, self.desk)
        self.has_systems = bool(systems or self.connections or self.desk)

    async def start(self) -> None:
        for connection in self.connections:
            await connection.start()

    async def close(self) -> None:
        for connection in self.connections:
            await connection.close()
        await self.records.close()
        if self.desk is not None:
            await self.desk.close()

    async def answer(self, answer: Answer, generate: Generate) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        """Streams the answer to `answer.question`, with the facts that it needs."""
        request = answer.question.draft()
        own_tools = bool(answer.question.own_tools or request.prompt or request.json_schema)
        if self._config.mode == "lookup" and not own_tools:
            if await self._propose_hand_over(answer):
                text = answer.proposals[0].text
                yield PolicyServiceChatResponse(delta=text, finish_reason=common_pb2.FINISH_REASON_STOP)
                return
            await self._add_facts(answer, request)
        offered = self.toolbox.definitions(answer.question.caller) if self._config.mode == "tools" else []
        if own_tools or not offered or request.n > 1:
            stream = generate(request)
        else:
            stream = self._with_tools(answer, request, offered, generate)
        async with contextlib.aclosing(stream) as responses:
            async for response in responses:
                yield response

    async def _propose_hand_over(self, answer: Answer) -> bool:
        caller, said = answer.question.caller, _user_texts(answer.question.request)
        if self.desk is None or "act" not in caller.scopes or not said or not wants_human(said[0]):
            return False
        arguments = {"reason": storable(said[0][:500])}
        answer.proposals.append(
            await self.desk.propose(caller, "hand_over", arguments, transcript(answer.question.request))
        )
        return True

    async def _add_facts(self, answer: Answer, request: PolicyServiceChatRequest) -> None:
        """Facts for the last message, or for the one before that it may refer to."""
        most = self._config.records
        for text in _user_texts(request)[:_TURNS_LOOKED_AT]:
            if wishes(text, most):
                with answer.trace.tool("lookup"):
                    facts = await look_up(self.records, answer.question.caller, text, most)
                if facts is not None:
                    answer.lookups.extend(facts.lookups)
                    _add_context(request, facts.context)
                return

    async def _with_tools(
        self,
        answer: Answer,
        request: PolicyServiceChatRequest,
        offered: list[dict[str, Any]],
        generate: Generate,
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        caller, used = answer.question.caller, 0
        names = {tool["function"]["name"] for tool in offered}
        for round_number in range(self._config.rounds + 1):
            request.tools_json = json.dumps(offered) if round_number < self._config.rounds else ""
            calls: list[common_pb2.ToolCall] = []
            said: list[str] = []
            tokens = 0
            async with contextlib.aclosing(generate(request)) as responses:
                async for response in responses:
                    calls.extend(_copy(call) for call in response.tool_calls)
                    said.append(response.delta)
                    tokens = response.completion_tokens or tokens
                    if response.completion_tokens:
                        response.completion_tokens += used
                    if calls:
                        # Ours to carry out, not the caller's.
                        response.ClearField("tool_calls")
                        response.ClearField("finish_reason")
                    if response.delta or response.tokens or not calls:
                        yield response
            used += tokens
            if not calls:
                return
            request.messages.add(role="assistant", content="".join(said), tool_calls=calls)
            for call in calls:
                # A name that the model made up is a text; traces hold none.
                with answer.trace.tool(call.name if call.name in names else "unknown", call.id):
                    outcome = await self.toolbox.call(caller, call, transcript(request))
                answer.lookups.append(outcome.lookup)
                request.messages.add(role="tool", content=outcome.lookup.text, tool_call_id=call.id, name=call.name)
                if outcome.proposal is not None:
                    answer.proposals.append(outcome.proposal)
            if answer.proposals:
                # What is proposed is said in our words, so that it says what a confirmation will do.
                yield PolicyServiceChatResponse(
                    delta="\n".join(proposal.text for proposal in answer.proposals),
                    finish_reason=common_pb2.FINISH_REASON_STOP,
                    completion_tokens=used,
                )
                return


def _copy(call: common_pb2.ToolCall) -> common_pb2.ToolCall:
    return common_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)


def transcript(request: PolicyServiceChatRequest) -> list[dict[str, str]]:
    """What was said, without system and tool turns."""
    spoken = [m for m in request.messages if m.role in ("user", "assistant") and m.content]
    return [{"role": m.role, "content": storable(m.content)} for m in spoken]


def _user_texts(request: PolicyServiceChatRequest) -> list[str]:
    """Newest first."""
    return [message.content for message in reversed(request.messages) if message.role == "user"]


def _add_context(request: PolicyServiceChatRequest, context: str) -> None:
    """Into the first system message: chat templates differ in where else they allow one."""
    if request.messages and request.messages[0].role == "system":
        request.messages[0].content += f"\n\n{context}"
        return
    messages = [common_pb2.Message(role="system", content=context)]
    for message in request.messages:
        copy = common_pb2.Message()
        copy.CopyFrom(message)
        messages.append(copy)
    del request.messages[:]
    request.messages.extend(messages)
