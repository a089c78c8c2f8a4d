"""Odoo over both of its protocols, against a small server that reads domains and specifications as Odoo does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.gateway.auth.callers import ALL_SCOPES, Caller, Customer
from services.gateway.metrics import Metrics
from services.gateway.systems.odoo import Odoo, OdooSystem, specification
from services.gateway.testing import serve_app
from services.gateway.tools.records import Records
from steersman.errors import ConfigError, UnavailableError

KEY = "odoo-api-key"
CUSTOMERS = {1: {"id": 1, "ref": "C-A", "name": "Ada"}, 2: {"id": 2, "ref": "C-B", "name": "Bob"}}
ORDERS = [
    {"id": 10, "name": "S00010", "partner_id": CUSTOMERS[1], "state": "sale", "amount_total": 39.8},
    {"id": 11, "name": "S00011", "partner_id": CUSTOMERS[2], "state": "draft", "amount_total": 5.0},
    {"id": 12, "name": "S00012", "partner_id": CUSTOMERS[1], "state": "draft", "amount_total": 0.0},
]
PRODUCTS = [{"id": 5, "default_code": "CHAIR-1", "name": "Garden chair", "qty_available": 12.0}]
MODELS: dict[str, list[dict[str, Any]]] = {
    "sale.order": ORDERS,
    "product.product": PRODUCTS,
    "res.partner": list(CUSTOMERS.values()),
}


class OdooServer:
    """`web_search_read` by JSON-2 and by JSON-RPC; an empty field is False, as Odoo says it."""

    def __init__(self) -> None:
        self.domains: list[Any] = []
        self.broken = False
        self.app = Starlette(
            routes=[
                Route("/json/2/{model}/web_search_read", self.json2, methods=["POST"]),
                Route("/jsonrpc", self.jsonrpc, methods=["POST"]),
            ]
        )

    async def json2(self, request: Request) -> Response:
        if request.headers["authorization"] != f"bearer {KEY}" or request.headers["x-odoo-database"] != "shop":
            return JSONResponse({"name": "werkzeug.exceptions.Unauthorized"}, 401)
        return JSONResponse(self.search(request.path_params["model"], await request.json()))

    async def jsonrpc(self, request: Request) -> Response:
        asked = (await request.json())["params"]
        arguments = asked["args"]
        if asked["method"] == "authenticate":
            return self.result(7 if arguments[:3] == ["shop", "bot", KEY] else False)
        if arguments[:3] != ["shop", 7, KEY] or self.broken:
            return JSONResponse({"jsonrpc": "2.0", "id": 1, "error": {"message": "Access Denied", "data": arguments}})
        return self.result(self.search(arguments[3], arguments[6]))

    def result(self, value: Any) -> Response:
        return JSONResponse({"jsonrpc": "2.0", "id": 1, "result": value})

    def search(self, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.domains.append(arguments["domain"])
        rows = [row for row in MODELS[model] if all(self.holds(row, *each) for each in arguments["domain"])]
        if arguments.get("order") == "id desc":
            rows.reverse()
        read = [self.read(row, arguments["specification"]) for row in rows[: arguments["limit"]]]
        return {"length": len(rows), "records": read}

    def holds(self, row: dict[str, Any], path: str, operator: str, value: Any) -> bool:
        assert operator == "="
        found: Any = row
        for part in path.split("."):
            found = found[part]
        return bool(found == value)

    def read(self, row: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"id": row["id"]}
        for name, below in wanted.items():
            value = row.get(name, False)
            found[name] = self.read(value, below["fields"]) if "fields" in below and value else value
        return found


@pytest.fixture
def server() -> OdooServer:
    return OdooServer()


@pytest.fixture(params=["json2", "jsonrpc"])
async def odoo(
    request: pytest.FixtureRequest, server: OdooServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Odoo]:
    monkeypatch.setenv("TEST_ODOO_KEY", KEY)
    async with serve_app(server.app) as url:
        settings = {"name": "odoo", "type": "odoo", "url": url, "database": "shop", "keyEnv": "TEST_ODOO_KEY"}
        if request.param == "jsonrpc":
            settings["login"] = "bot"
        system = Odoo(OdooSystem.model_validate(settings))
        yield system
        await system.close()


def asking(customer: str | None) -> Caller:
    return Caller("k", "acme", ALL_SCOPES, customer=Customer(customer, "test") if customer else None)


async def found(odoo: Odoo, customer: str | None, kind: Any, number: str | None) -> list[dict[str, Any]]:
    records = await Records([odoo], Metrics("test")).find(asking(customer), kind, number)
    return [dict(record.fields) for record in records]


async def test_a_customer_reads_his_own_orders_and_no_other(odoo: Odoo, server: OdooServer) -> None:
    (order,) = await found(odoo, "C-A", "order", "S00010")
    assert (order["number"], order["state"], order["total"], order["currency"]) == ("S00010", "sale", 39.8, None)
    assert [order["number"] for order in await found(odoo, "C-A", "order", None)] == ["S00012", "S00010"]
    assert await found(odoo, "C-A", "order", "S00011") == []
    assert await found(odoo, None, "order", "S00010") == []
    assert await found(odoo, "C-B", "customer", None) == [{"code": "C-B", "name": "Bob"}]
    assert all(["partner_id.ref", "=", "C-A"] in domain for domain in server.domains[:3])


async def test_stock_belongs_to_nobody(odoo: Odoo) -> None:
    assert await found(odoo, None, "stock", "CHAIR-1") == [
        {"code": "CHAIR-1", "name": "Garden chair", "available": 12.0}
    ]


async def test_a_value_is_never_a_condition(odoo: Odoo, server: OdooServer) -> None:
    assert await found(odoo, '["|",["id",">",0]]', "order", "S00010") == []
    assert server.domains == [[["partner_id.ref", "=", '["|",["id",">",0]]'], ["name", "=", "S00010"]]]


async def test_a_refusal_is_told_without_what_was_sent(
    server: OdooServer, odoo: Odoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_ODOO_KEY", "wrong")
    settings = {
        "name": "odoo", "type": "odoo", "url": str(odoo._client.base_url), "database": "shop",
        "keyEnv": "TEST_ODOO_KEY", "login": odoo._login,
    }  # fmt: skip
    refused = Odoo(OdooSystem.model_validate(settings))
    with pytest.raises(UnavailableError) as caught:
        await found(refused, "C-A", "order", "S00010")
    assert "wrong" not in str(caught.value)
    await refused.close()


def test_the_key_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_ODOO_KEY", raising=False)
    settings = {"name": "o", "type": "odoo", "url": "http://o", "database": "d", "keyEnv": "TEST_ODOO_KEY"}
    with pytest.raises(ConfigError, match="TEST_ODOO_KEY is not set"):
        Odoo(OdooSystem.model_validate(settings))


def test_fields_behind_relations_are_read_with_the_record() -> None:
    assert specification({"name", "partner_id.ref", "partner_id.country_id.code"}) == {
        "name": {},
        "partner_id": {"fields": {"ref": {}, "country_id": {"fields": {"code": {}}}}},
    }
