"""Puts facts from business systems under an answer: by lookup before it, or by tool calls in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

from services.gateway.answer import Answer, Question
from services.gateway.errors import BadRequestError
from services.gateway.metrics import Metrics
from services.gateway.store import storable
from services.gateway.tools.claims import Claims, ground_of, told_by_application
from services.gateway.tools.desk import Desk
from services.gateway.tools.hand_over import wants_person
from services.gateway.tools.lookup import look_up
from services.gateway.tools.reading import Wish
from services.gateway.tools.records import Records
from services.gateway.tools_config import ToolsConfig
from steersman.background import Background
from steersman.errors import DeadlineError, NotFoundError, UnavailableError
from steersman.store.engine import Store
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse

if TYPE_CHECKING:
    from services.gateway.tools.mcp_client import McpConnection
    from services.gateway.tools.toolbox import Toolbox

Generate = Callable[[PolicyServiceChatRequest], AsyncGenerator[PolicyServiceChatResponse, None]]
_TURNS_LOOKED_AT = 3
_LONGEST_WAIT = 3600.0


class Grounding:
    def __init__(self, config: ToolsConfig, store: Store, metrics: Metrics) -> None:
        self._config = config
        systems = [system.open() for system in config.systems]
        self.records = Records(systems, metrics)
        self.connections = _connections(config)
        self.desk = Desk(config.hand_over, store) if config.hand_over is not None else None
        self.toolbox = _toolbox(self.records, self.connections, self.desk) if config.mode == "tools" else None
        self._claims = Claims(config, metrics)
        self.has_systems = bool(systems or self.connections or self.desk)

    async def start(self, background: Background) -> None:
        for connection in self.connections:
            await connection.start(background)

    async def close(self) -> None:
        await self.records.close()
        if self.desk is not None:
            await self.desk.close()

    async def answer(self, answer: Answer, generate: Generate) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        """Streams the answer to `answer.question`, with the facts that it needs and no others."""
        question, request = answer.question, answer.question.draft()
        asked = await asyncio.to_thread(self._asked, question)
        stream = self._grounded(answer, request, asked, generate)
        if self._config.unsourced != "allow" and (self.records or self.connections) and not _constrained(request):
            reader, told = self.records.reader(question.caller.tenant), told_by_application(question.request)
            ground = await asyncio.to_thread(ground_of, reader, asked, answer.lookups, told)
            stream = self._claims.watched(answer, ground, stream)
        async with contextlib.aclosing(stream) as responses:
            async for response in responses:
                yield response

    def _asked(self, question: Question) -> list[Wish]:
        """What the last message asks for, or the one before that it may refer to."""
        reader = self.records.reader(question.caller.tenant)
        texts = _user_texts(question.request)[:_TURNS_LOOKED_AT] or [question.request.prompt]
        return next((found for text in texts if (found := reader.wishes(text, self._config.records))), [])

    async def _grounded(
        self, answer: Answer, request: PolicyServiceChatRequest, asked: Sequence[Wish], generate: Generate
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        wanted: Literal["no", "also", "only"] = "no"
        if self._config.mode == "lookup" and request.messages:
            wanted = await self._propose_hand_over(answer, constrained=_constrained(request))
            if wanted == "only":
                text = answer.proposals[0].text
                yield PolicyServiceChatResponse(delta=text, finish_reason=common_pb2.FINISH_REASON_STOP)
                return
            with answer.trace.tool("lookup") if asked else contextlib.nullcontext():
                facts = await look_up(
                    self.records,
                    answer.question.caller,
                    asked,
                    instruction=self._config.instruction,
                    newest=self._config.newest,
                )
            if facts is not None:
                answer.lookups.extend(facts.lookups)
                _add_context(request, facts.context)
        ours = self.toolbox.definitions(answer.question.caller) if self.toolbox is not None else []
        if ours and request.messages:
            stream = self._with_tools(answer, request, ours, asked, generate)
        else:
            self._must_be_sourced(answer, request, asked)
            stream = generate(request)
        async with contextlib.aclosing(stream) as responses:
            async for response in responses:
                if wanted == "also" and response.finish_reason and not _constrained(request):
                    response.delta += f"\n\n{answer.proposals[0].text}"
                yield response

    async def _propose_hand_over(self, answer: Answer, *, constrained: bool) -> Literal["no", "also", "only"]:
        """Proposes it where the last message asks for a person, alone or beside something else."""
        caller, said = answer.question.caller, _user_texts(answer.question.request)
        if self.desk is None or "act" not in caller.scopes or not said:
            return "no"
        wanted = await asyncio.to_thread(wants_person, said[0])
        if wanted == "no":
            return "no"
        arguments = {"reason": storable(said[0][:500])}
        answer.proposals.append(
            await self.desk.propose(caller, "hand_over", arguments, transcript(answer.question.request))
        )
        return "also" if constrained else wanted

    def _must_be_sourced(self, answer: Answer, request: PolicyServiceChatRequest, asked: Sequence[Wish]) -> None:
        """Refuses an answer in a form that leaves no room to say that there is no record.

        Raises:
            NotFoundError: nothing was found for what is asked.
            UnavailableError: it could not be looked up.
        """
        systems = bool(self.records or self.connections)
        if not systems or not request.json_schema or answer.question.must_call or self._config.unsourced != "hold":
            return
        outcomes = {lookup.outcome for lookup in answer.lookups}
        if not asked or "found" in outcomes or told_by_application(answer.question.request):
            return
        self._claims.refused()
        details = {"param": "response_format", "code": "no_record"}
        if "failed" in outcomes:
            raise UnavailableError(
                "The business systems cannot be asked at the moment; try again later", details=details
            )
        names = ", ".join(f"{wish.kind} {wish.number or ''}".strip() for wish in asked[:3])
        raise NotFoundError(
            f"There is no record for what is asked ({names}), and response_format leaves no room to say so; "
            "ask without it",
            details=details,
        )

    async def _with_tools(
        self,
        answer: Answer,
        request: PolicyServiceChatRequest,
        ours: list[dict[str, Any]],
        asked: Sequence[Wish],
        generate: Generate,
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        """Rounds of the gateway's own tools, beside those that the caller brings, until the model answers.

        What has a form of its own (a schema, several choices) is generated once more at the end, without our tools:
        nothing of the rounds is given out then.
        """
        theirs = json.loads(request.tools_json) if request.tools_json else []
        names, foreign = ({tool["function"]["name"] for tool in tools} for tools in (ours, theirs))
        if both := names & foreign:
            raise BadRequestError(f"tools: '{min(both)}' is a tool of this gateway; choose another name", param="tools")
        shaped = bool(request.json_schema) or request.n > 1
        turn = PolicyServiceChatRequest()
        turn.CopyFrom(request)
        if shaped:
            turn.n, turn.json_schema, turn.top_logprobs = 1, "", 0
        used = 0
        for round_number in range(self._config.rounds + 1):
            last = round_number == self._config.rounds
            if last and shaped:
                break
            turn.tools_json = json.dumps([*([] if last else ours), *([] if shaped else theirs)] or None)
            turn.tools_json = "" if turn.tools_json == "null" else turn.tools_json
            calls: list[common_pb2.ToolCall] = []
            said: list[str] = []
            tokens = 0
            async with contextlib.aclosing(generate(turn)) as responses:
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
                    if not shaped and (response.delta or response.tokens or not calls):
                        yield response
            used += tokens
            mine = [call for call in calls if call.name not in foreign][: self._config.calls]
            if not mine:
                if calls:
                    yield PolicyServiceChatResponse(
                        tool_calls=calls, finish_reason=common_pb2.FINISH_REASON_TOOL_CALLS, completion_tokens=used
                    )
                if calls or not shaped:
                    return
                break
            # Calls of the caller's tools beside ours are left out: the model makes them again, knowing what ours gave.
            turn.messages.add(role="assistant", content="".join(said), tool_calls=mine)
            for call in mine:
                await self._carry_out(answer, turn, call, names)
            if answer.proposals:
                # What is proposed is said in our words, so that it says what a confirmation will do.
                yield PolicyServiceChatResponse(
                    delta="\n".join(proposal.text for proposal in answer.proposals),
                    finish_reason=common_pb2.FINISH_REASON_STOP,
                    completion_tokens=used,
                )
                return
        self._must_be_sourced(answer, request, asked)
        del request.messages[:]
        request.messages.extend(turn.messages)
        async with contextlib.aclosing(generate(request)) as responses:
            async for response in responses:
                if response.completion_tokens and response.choice_index == 0:
                    response.completion_tokens += used
                yield response

    async def _carry_out(
        self, answer: Answer, turn: PolicyServiceChatRequest, call: common_pb2.ToolCall, names: Collection[str]
    ) -> None:
        """One tool call within the answer's time; its result becomes a turn of the conversation."""
        # A name that the model made up is a text; traces hold none.
        with answer.trace.tool(call.name if call.name in names else "unknown", call.id):
            try:
                async with asyncio.timeout(min(max(answer.seconds_left, 0), _LONGEST_WAIT)):
                    assert self.toolbox is not None  # whose tool it is
                    outcome = await self.toolbox.call(answer.question.caller, call, transcript(turn))
            except TimeoutError:
                raise DeadlineError("The answer's tools took too long; ask for less") from None
        answer.lookups.append(outcome.lookup)
        turn.messages.add(role="tool", content=outcome.lookup.text, tool_call_id=call.id, name=call.name)
        if outcome.proposal is not None:
            answer.proposals.append(outcome.proposal)


# MCP's SDK and JSON schemas take seconds to load, so only a gateway that uses them loads them.
def _connections(config: ToolsConfig) -> list[McpConnection]:
    if not config.mcp_servers:
        return []
    from services.gateway.tools.mcp_client import McpConnection

    return [McpConnection(server) for server in config.mcp_servers]


def _toolbox(records: Records, connections: list[McpConnection], desk: Desk | None) -> Toolbox:
    from services.gateway.tools.toolbox import Toolbox

    return Toolbox(records, connections, desk)


def _constrained(request: PolicyServiceChatRequest) -> bool:
    return bool(request.json_schema)


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
