"""Reads from Odoo 17 or newer: JSON-2 (odoo.com, developer reference, External JSON-2 API), or JSON-RPC before 19.

Both call `web_search_read`, whose specification names fields behind a relation, so that one call reads a record with
the key of its customer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from services.gateway.fetching import fetch_json
from services.gateway.systems.base import Kind, Query, RecordKind, SystemOptions
from services.gateway.systems.remote import Remote, equalities, paths_of
from steersman.environment import secret_in


def _odoo_kinds() -> dict[Kind, RecordKind]:
    return {
        "order": RecordKind(
            entity="sale.order",
            number="name",
            owner="partner_id.ref",
            fields={
                "number": "name",
                "date": "date_order",
                "state": "state",
                "invoicing": "invoice_status",
                "total": "amount_total",
                "currency": "currency_id.name",
            },
            newest_first="id",
        ),
        "delivery": RecordKind(
            entity="stock.picking",
            number="name",
            owner="partner_id.ref",
            fields={
                "number": "name",
                "state": "state",
                "planned": "scheduled_date",
                "shipped": "date_done",
                "for": "origin",
            },
            where=[["picking_type_code", "=", "outgoing"]],
            newest_first="id",
        ),
        "invoice": RecordKind(
            entity="account.move",
            number="name",
            owner="partner_id.ref",
            fields={
                "number": "name",
                "date": "invoice_date",
                "state": "state",
                "payment": "payment_state",
                "total": "amount_total",
                "to_pay": "amount_residual",
                "currency": "currency_id.name",
            },
            where=[["move_type", "=", "out_invoice"], ["state", "=", "posted"]],
            newest_first="id",
        ),
        "stock": RecordKind(
            entity="product.product",
            number="default_code",
            owner=None,
            fields={"code": "default_code", "name": "name", "available": "qty_available"},
        ),
        "customer": RecordKind(entity="res.partner", number="ref", owner="ref", fields={"code": "ref", "name": "name"}),
    }


class OdooSystem(SystemOptions):
    """Odoo 17 or newer with the API key of a user who may read the models below."""

    type: Literal["odoo"]
    url: str
    """Of the server, for example https://company.odoo.com."""
    database: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,63}$")]
    key_env: str
    """Environment variable with the user's API key."""
    login: str | None = None
    """The user's login: asks by JSON-RPC, which Odoo before 19 needs. None: by JSON-2, which Odoo 22 will need."""
    kinds: dict[Kind, RecordKind] = Field(default_factory=_odoo_kinds)

    def open(self) -> Odoo:
        return Odoo(self)


class Odoo(Remote):
    """See `services.gateway.systems.base.System`."""

    def __init__(self, config: OdooSystem) -> None:
        self._key = secret_in(config.key_env, f"tools.systems.{config.name}.keyEnv")
        self._database = config.database
        self._login = config.login
        self._user: int | None = None
        self._logging_in = asyncio.Lock()
        headers = {"x-odoo-database": config.database}
        if self._login is None:
            headers["authorization"] = f"bearer {self._key}"
        super().__init__(config, config.url, headers)

    async def _ask(self, query: Query) -> Any:
        kind = query.kind
        wanted = specification(paths_of(kind))
        arguments = {"domain": domain(query), "specification": wanted, "limit": query.limit}
        if query.number is None and kind.newest_first:
            arguments["order"] = f"{kind.newest_first} desc"
        if self._login is None:
            found = await fetch_json(self._client, "POST", f"json/2/{kind.entity}/web_search_read", json=arguments)
        else:
            found = await self._call_remotely(kind.entity, arguments)
        return _plain(found["records"])

    async def _call_remotely(self, model: str, arguments: dict[str, Any]) -> Any:
        async with self._logging_in:
            if self._user is None:
                user = await self._rpc("common", "authenticate", [self._database, self._login, self._key, {}])
                if not isinstance(user, int) or isinstance(user, bool):
                    raise ValueError("the login is refused")
                self._user = user
        call = [self._database, self._user, self._key, model, "web_search_read", [], arguments]
        return await self._rpc("object", "execute_kw", call)

    async def _rpc(self, service: str, method: str, arguments: list[Any]) -> Any:
        body = {
            "jsonrpc": "2.0",
            "method": "call",
            "id": 1,
            "params": {"service": service, "method": method, "args": arguments},
        }
        answer = await fetch_json(self._client, "POST", "jsonrpc", json=body)
        if "result" not in answer:  # an error is told with status 200; its text may quote the arguments
            raise ValueError("the call is refused")
        return answer["result"]


def domain(query: Query) -> list[Any]:
    """Odoo's search domain; a list of conditions is a conjunction, and values cannot become conditions."""
    conditions: list[Any] = [[field, "=", value] for field, value in equalities(query)]
    if isinstance(query.kind.where, list):
        conditions.extend(query.kind.where)
    return conditions


def specification(paths: Iterable[str]) -> dict[str, Any]:
    """What `web_search_read` shall read: `partner_id.ref` as {"partner_id": {"fields": {"ref": {}}}}."""
    wanted: dict[str, Any] = {}
    for path in paths:
        *relations, field = path.split(".")
        at = wanted
        for relation in relations:
            at = at.setdefault(relation, {}).setdefault("fields", {})
        at.setdefault(field, {})
    return wanted


def _plain(value: Any) -> Any:
    """Odoo says false where a field holds nothing, and gives each related record its id."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if key != "id"}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if value is False else value
