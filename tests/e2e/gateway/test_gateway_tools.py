"""MCP servers, hand-over tickets and confirmed actions."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from gateway_erp import Identities
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.gateway.auth.keys import create_key
from services.gateway.store import open_store
from services.gateway.testing import free_port, gateway_config, running_gateway, serve_app, until, wait_for_port
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import chat_pb2, chat_pb2_grpc, common_pb2, policy_pb2

HERE = Path(__file__).resolve().parent
TOOLS = [
    {"name": "order_state", "customerArgument": "customer_id"},
    {"name": "opening_hours", "customerArgument": None},
]


def calling(*calls: tuple[str, dict[str, Any]]) -> Any:
    """A model that makes these calls and then repeats what they gave."""

    def reply(request: policy_pb2.PolicyServiceChatRequest) -> Any:
        results = [message.content for message in request.messages if message.role == "tool"]
        if results:
            return " | ".join(results)
        return [
            common_pb2.ToolCall(id=str(i), name=name, arguments=json.dumps(arguments))
            for i, (name, arguments) in enumerate(calls)
        ]

    return reply


@asynccontextmanager
async def serving(policy: FakePolicy, **changes: Any) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    async with (
        serve_policy(policy) as endpoint,
        running_gateway(gateway_config(endpoint, **changes)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=30) as http,
    ):
        yield gateway, http


async def ask(http: httpx.AsyncClient, text: str, headers: dict[str, str]) -> dict[str, Any]:
    body = {"model": "steersman", "messages": [{"role": "user", "content": text}]}
    answer = await http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- MCP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_mcp_tools_get_the_verified_customer(identities: Identities, transport: str) -> None:
    process = None
    server: dict[str, Any] = {"name": "orders", "tools": TOOLS, "seconds": 30}
    if transport == "stdio":
        server["command"] = [sys.executable, str(HERE / "mcp_orders.py")]
    else:
        port = free_port()
        command = [sys.executable, HERE / "mcp_orders.py", str(port)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: ASYNC220
        await asyncio.to_thread(wait_for_port, port, process)
        server["url"] = f"http://127.0.0.1:{port}/mcp"
    policy = FakePolicy()
    tools = {"mode": "tools", "mcpServers": [server]}
    try:
        async with serving(policy, identity=identities.config, tools=tools) as (_, http):
            as_a = {"x-customer-token": identities.token("C-A")}
            policy.reply = calling(("orders_order_state", {"number": "1"}), ("orders_opening_hours", {}))
            answer = await ask(http, "help", as_a)
            said = answer["choices"][0]["message"]["content"]
            assert said == '{"asked_for": "C-A", "state": "delivered"} | 9 to 17'
            assert {"system": "orders", "record": "order_state"} in answer["steersman"]["sources"]
            offered = json.loads(policy.requests[0].tools_json)
            names = {tool["function"]["name"]: tool["function"]["parameters"] for tool in offered}
            assert set(names) == {"orders_order_state", "orders_opening_hours"}
            assert "customer_id" not in json.dumps(names)

            policy.reply = calling(
                ("orders_order_state", {"number": "7", "customer_id": "C-B"}), ("orders_delete_everything", {})
            )
            said = (await ask(http, "help", as_a))["choices"][0]["message"]["content"]
            assert "wrong arguments" in said
            assert "there is no tool" in said
            assert "blocked" not in said

            policy.reply = calling(("orders_order_state", {"number": "1"}))
            assert "there is no tool" in (await ask(http, "help", {}))["choices"][0]["message"]["content"]
    finally:
        if process is not None:
            process.terminate()
            process.wait(10)


async def test_a_late_or_broken_call_takes_no_tool_away() -> None:
    tools = [
        {"name": name, "customerArgument": None}
        for name in ("opening_hours", "sleepy", "one_line", "crash", "long_winded")
    ]
    command = [sys.executable, str(HERE / "mcp_orders.py")]
    server = {"name": "orders", "tools": tools, "seconds": 5, "command": command, "resultChars": 4000}
    policy = FakePolicy()
    async with serving(policy, tools={"mode": "tools", "mcpServers": [server]}) as (gateway, http):

        async def call(name: str, **arguments: Any) -> str:
            policy.reply = calling((f"orders_{name}", arguments))
            return (await ask(http, "help", {}))["choices"][0]["message"]["content"]

        # One line of JSON arrives whole, or is cut with a mark.
        whole = await call("one_line", size=2000)
        assert json.loads(whole) == {"rows": "x" * 2000, "last": True}
        cut = await call("one_line", size=5000)
        assert cut.startswith('{"rows": "xxx')
        assert cut.endswith("[cut: the first 4000 of 5026 characters]")
        offered = json.loads(policy.requests[-2].tools_json)
        said = next(t["function"]["description"] for t in offered if t["function"]["name"] == "orders_long_winded")
        assert "[cut: the first 1000 of 5500 characters]" in said

        # A call that takes too long ends alone, also beside others.
        connection = gateway.assistant.grounding.connections[0]
        object.__setattr__(connection.config, "seconds", 0.5)
        late = await call("sleepy", seconds=30)
        assert "cannot be looked up" in late
        assert await call("opening_hours") == "9 to 17"

        # A server that ends is started again at once; its tools stay offered.
        object.__setattr__(connection.config, "seconds", 5)
        assert "cannot be looked up" in await call("crash")
        policy.reply = calling(("orders_opening_hours", {}))
        assert "orders_opening_hours" in {d["function"]["name"] for d in connection_tools(gateway)}
        async with asyncio.timeout(8):
            while await call("opening_hours") != "9 to 17":  # noqa: ASYNC110
                await asyncio.sleep(0.1)


def connection_tools(gateway: Any) -> list[dict[str, Any]]:
    from services.gateway.auth.callers import ALL_SCOPES, Caller

    return gateway.assistant.grounding.toolbox.definitions(Caller("k", "default", ALL_SCOPES))


# --- tickets ----------------------------------------------------------------------------------------------------


class TicketSystem:
    """Receives webhooks, and speaks what is used of the interfaces of Request Tracker, Zammad and Zendesk."""

    def __init__(self) -> None:
        self.requests: list[tuple[Request, bytes]] = []
        self.failing = False
        self.app = Starlette(
            routes=[
                Route("/hook", self.receive, methods=["POST"]),
                Route("/REST/2.0/ticket", self.receive, methods=["POST"]),
                Route("/api/v1/tickets", self.receive, methods=["POST"]),
                Route("/api/v2/tickets.json", self.receive, methods=["POST"]),
            ]
        )

    async def receive(self, request: Request) -> Response:
        if self.failing:
            return Response(status_code=503)
        self.requests.append((request, await request.body()))
        made = {"id": str(40 + len(self.requests)), "type": "ticket"}
        return JSONResponse({"ticket": made} if "/v2/" in request.url.path else made, 201)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> TicketSystem:
    monkeypatch.setenv("TEST_HOOK_SECRET", "h" * 40)
    monkeypatch.setenv("TEST_RT_TOKEN", "rt-token")
    return TicketSystem()


@pytest.mark.parametrize("kind", ["webhook", "requestTracker", "zammad", "zendesk"])
async def test_a_conversation_is_handed_over_once_after_confirmation(
    identities: Identities, desk: TicketSystem, kind: str
) -> None:
    policy = FakePolicy()
    async with serve_app(desk.app) as url:
        target = {
            "webhook": {"url": f"{url}/hook", "secretEnv": "TEST_HOOK_SECRET"},
            "requestTracker": {"url": url, "tokenEnv": "TEST_RT_TOKEN", "queue": "Support"},
            "zammad": {"url": url, "tokenEnv": "TEST_RT_TOKEN", "group": "Support", "customer": "bot@example.com"},
            "zendesk": {"url": url, "tokenEnv": "TEST_RT_TOKEN", "user": "agent@example.com"},
        }
        tools = {"handOver": {kind: target[kind]}}
        async with serving(policy, identity=identities.config, tools=tools) as (_, http):
            as_a = {"x-customer-token": identities.token("C-A")}
            as_b = {"x-customer-token": identities.token("C-B")}
            answer = await ask(http, "I want to talk to a human, please", as_a)
            said = answer["choices"][0]["message"]["content"]
            assert said.startswith("I can hand this conversation over")
            assert policy.requests == []
            assert desk.requests == []
            (proposal,) = answer["steersman"]["proposed_actions"]
            confirm = f"/v1/actions/{proposal['id']}/confirm"

            assert (await http.post(confirm, headers=as_b)).status_code == 404
            assert (await http.post("/v1/actions/none/confirm", headers=as_a)).status_code == 404
            desk.failing = True
            assert (await http.post(confirm, headers=as_a)).status_code == 503
            desk.failing = False
            done = [await http.post(confirm, headers=as_a) for _ in range(2)]
            assert [answer.json()["ticket"] for answer in done] == ["41", "41"]
            assert done[0].json()["text"] == "I have handed this conversation over to a colleague: ticket 41."
            assert len(desk.requests) == 1
    request, body = desk.requests[0]
    assert b"I want to talk to a human" in body
    assert b"C-A" in body
    if kind == "webhook":
        moment, signature = (part.split("=")[1] for part in request.headers["x-steersman-signature"].split(","))
        assert hmac.new(b"h" * 40, f"{moment}.".encode() + body, hashlib.sha256).hexdigest() == signature
        return
    sent, authorization = json.loads(body), request.headers["authorization"]
    if kind == "requestTracker":
        assert (authorization, sent["Queue"]) == ("token rt-token", "Support")
    elif kind == "zammad":
        assert (authorization, sent["group"]) == ("Token token=rt-token", "Support")
        assert sent["customer"] == "bot@example.com"
        assert "I want to talk to a human" in sent["article"]["body"]
    else:
        assert base64.b64decode(authorization.removeprefix("Basic ")) == b"agent@example.com/token:rt-token"
        assert sent["ticket"]["external_id"] == request.headers["idempotency-key"] == proposal["id"]


async def test_an_action_is_proposed_and_confirmed_over_grpc(identities: Identities, desk: TicketSystem) -> None:
    """The same desk as over REST: once, for the customer whom it was proposed to."""
    async with serve_app(desk.app) as url:
        tools = {"handOver": {"webhook": {"url": f"{url}/hook", "secretEnv": "TEST_HOOK_SECRET"}}}
        async with (
            serving(FakePolicy(), identity=identities.config, tools=tools) as (gateway, _),
            grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel,
        ):
            stub = chat_pb2_grpc.ChatServiceStub(channel)
            mine, other = ([("x-customer-token", identities.token(name))] for name in ("C-A", "C-B"))
            question = common_pb2.Message(role="user", content="I want to talk to a human, please")
            parts = [part async for part in stub.Chat(chat_pb2.ChatRequest(messages=[question]), metadata=mine)]
            (proposal,) = parts[-1].proposed_actions
            assert proposal.text
            assert json.loads(proposal.arguments_json) == {"reason": "I want to talk to a human, please"}
            assert parts[-1].feedback_token
            request = chat_pb2.ConfirmActionRequest(id=proposal.id)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ConfirmAction(request, metadata=other)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            done = [await stub.ConfirmAction(request, metadata=mine) for _ in range(2)]
            assert [answer.ticket for answer in done] == ["41", "41"]
            assert done[0].text == "I have handed this conversation over to a colleague: ticket 41."
    assert len(desk.requests) == 1


async def test_writes_need_the_scope_and_are_off_by_default(
    identities: Identities, desk: TicketSystem, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    chat = {"authorization": "Bearer " + create_key(open_store(database), "acme", ["chat"])}
    policy = FakePolicy()
    async with serve_app(desk.app) as url:
        tools = {"handOver": {"webhook": {"url": f"{url}/hook", "secretEnv": "TEST_HOOK_SECRET"}}}
        async with serving(policy, tools=tools, database=database, requireApiKey=True) as (_, http):
            answer = await ask(http, "I want to talk to a human", chat)
            assert answer["steersman"]["proposed_actions"] == []
            assert (await http.post("/v1/actions/x/confirm", headers=chat)).status_code == 403
    async with serving(policy) as (_, http):
        answer = await ask(http, "I want to talk to a human", {})
        assert answer["steersman"]["proposed_actions"] == []
        assert (await http.post("/v1/actions/x/confirm")).status_code == 404
    assert desk.requests == []


async def test_a_broken_mcp_server_is_not_the_end(identities: Identities) -> None:
    server = {"name": "gone", "tools": TOOLS, "command": [sys.executable, "-c", "pass"], "seconds": 1}
    policy = FakePolicy()
    async with serving(policy, tools={"mode": "tools", "mcpServers": [server]}) as (gateway, http):
        assert (await ask(http, "hello", {}))["choices"][0]["message"]["content"] == "You said: hello"
        await until(lambda: gateway.assistant.ready)
