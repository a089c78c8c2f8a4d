"""A small business system that speaks OData, and a gateway before it that knows its customers."""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from services.gateway.auth.identity import sign_customer
from services.gateway.server import Gateway
from services.gateway.testing import gateway_config, running_gateway, serve_app
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import policy_pb2

SECRET = "s" * 40
ROWS: dict[str, list[dict[str, Any]]] = {
    "Orders": [
        {"No": "1", "Owner": "C-A", "State": "delivered", "Total": "19.90"},
        {"No": "2", "Owner": "C-A", "State": "processing", "Total": "39.80"},
        {"No": "3", "Owner": "C-B", "State": "blocked", "Total": "59.70"},
        {"No": "SO-17", "Owner": "C-A", "State": "sent", "Total": "5.00"},
    ],
    "Invoices": [{"No": "2", "Owner": "C-A", "State": "posted", "Total": "39.80"}],
    "Products": [{"No": "CHAIR-1", "Name": "Garden chair", "Left": "12"}],
}
_CONDITION = re.compile(r"(\w+) eq '((?:[^']|'')*)'")


@dataclass
class Business:
    """Answers `$filter`s that are conjunctions of equalities, and keeps what it was asked."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: ROWS)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        entity = request.url.path.strip("/")
        wanted = {name: value.replace("''", "'") for name, value in _CONDITION.findall(request.query_params["$filter"])}
        self.asked.append((entity, wanted))
        found = [row for row in self.rows[entity] if all(row[name] == value for name, value in wanted.items())]
        response: Response = JSONResponse({"value": found[: int(request.query_params["$top"])]})
        await response(scope, receive, send)


def _kind(entity: str, **fields: str) -> dict[str, Any]:
    owner = None if entity == "Products" else "Owner"
    newest = {} if entity == "Products" else {"newestFirst": "No"}
    return {"entity": entity, "number": "No", "owner": owner, "fields": {"number": "No", **fields}, **newest}


KINDS = {
    "order": _kind("Orders", state="State", total="Total"),
    "invoice": _kind("Invoices", state="State", total="Total"),
    "stock": _kind("Products", name="Name", available="Left"),
}


def repeat_prompt(request: policy_pb2.PolicyServiceChatRequest) -> str:
    """The worst model: whatever it is shown, it says."""
    return "\n".join(f"{message.role}: {message.content}" for message in request.messages)


@dataclass
class Shop:
    gateway: Gateway
    business: Business
    policy: FakePolicy
    http: httpx.AsyncClient

    async def ask(self, text: str, customer: str | None = "C-A", **changes: Any) -> dict[str, Any]:
        response = await self.post(text, customer, **changes)
        assert response.status_code == 200, response.text
        return response.json()

    async def post(self, text: str, customer: str | None = "C-A", **changes: Any) -> httpx.Response:
        body = {"model": "steersman", "messages": [{"role": "user", "content": text}], "max_tokens": 4000, **changes}
        return await self.http.post("/v1/chat/completions", json=body, headers=signed(customer))

    async def say(self, text: str, customer: str | None = "C-A", **changes: Any) -> str:
        return (await self.ask(text, customer, **changes))["choices"][0]["message"]["content"]


def signed(customer: str | None, tenant: str = "default") -> dict[str, str]:
    """Headers of a trusted back end that names this customer."""
    if customer is None:
        return {}
    moment = int(time.time())
    signature = sign_customer(SECRET.encode(), customer, tenant, moment)
    return {"x-customer": customer, "x-customer-signature": f"t={moment},v1={signature}"}


@asynccontextmanager
async def running_shop(
    policy: FakePolicy | None = None, *, tools: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[Shop]:
    policy, business = policy or FakePolicy(reply=repeat_prompt), Business()
    os.environ["TEST_IDENTITY_SECRET"] = SECRET
    async with serve_app(business) as url, serve_policy(policy) as endpoint:
        system = {"name": "erp", "type": "odata", "url": url, "kinds": KINDS}
        config = gateway_config(
            endpoint,
            identity={"signedHeader": {"secretEnv": "TEST_IDENTITY_SECRET"}},
            tools={"systems": [system], **(tools or {})},
            **changes,
        )
        async with running_gateway(config) as gateway, httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
            yield Shop(gateway, business, policy, http)
