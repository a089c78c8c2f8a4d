"""Reads from Tryton through its REST interface (docs.tryton.org: trytond, topics, REST API)."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any, Literal

from pydantic import Field

from services.gateway.fetching import fetch_json
from services.gateway.systems.base import Kind, Query, RecordKind, SystemOptions
from services.gateway.systems.remote import Remote, equalities, paths_of
from steersman.environment import header_secret_in


def _tryton_kinds() -> dict[Kind, RecordKind]:
    return {
        "order": RecordKind(
            entity="sale.sale",
            number="number",
            owner="party.code",
            fields={
                "number": "number",
                "date": "sale_date",
                "state": "state",
                "shipping": "shipment_state",
                "invoicing": "invoice_state",
                "total": "total_amount",
                "currency": "currency.code",
            },
            where=[["number", "!=", None]],
            newest_first="id",
        ),
        "delivery": RecordKind(
            entity="stock.shipment.out",
            number="number",
            owner="customer.code",
            fields={
                "number": "number",
                "state": "state",
                "planned": "planned_date",
                "shipped": "effective_date",
                "for": "origins",
            },
            where=[["number", "!=", None]],
            newest_first="id",
        ),
        "invoice": RecordKind(
            entity="account.invoice",
            number="number",
            owner="party.code",
            fields={
                "number": "number",
                "date": "invoice_date",
                "state": "state",
                "total": "total_amount",
                "to_pay": "amount_to_pay",
                "currency": "currency.code",
            },
            where=[["type", "=", "out"], ["number", "!=", None]],
            newest_first="id",
        ),
        "stock": RecordKind(
            entity="product.product",
            number="code",
            owner=None,
            fields={"code": "code", "name": "template.name", "available": "quantity"},
        ),
        "customer": RecordKind(
            entity="party.party", number="code", owner="code", fields={"code": "code", "name": "name"}
        ),
    }


class TrytonSystem(SystemOptions):
    """Tryton's REST interface (trytond 7.4 or newer) with the key of a user application `rest`."""

    type: Literal["tryton"]
    url: str
    """Of the server, for example http://erp:8000."""
    database: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,63}$")]
    key_env: str
    """Environment variable with the user application's key."""
    kinds: dict[Kind, RecordKind] = Field(default_factory=_tryton_kinds)
    stock_locations: list[int] = []
    """Ids of the warehouses whose goods count as available."""

    def open(self) -> Tryton:
        return Tryton(self)


class Tryton(Remote):
    """See `services.gateway.systems.base.System`."""

    def __init__(self, config: TrytonSystem) -> None:
        key = header_secret_in(config.key_env, f"tools.systems.{config.name}.keyEnv")
        url = f"{config.url.rstrip('/')}/{config.database}/rest/model/"
        super().__init__(config, url, {"authorization": f"bearer {key}"})
        self._locations = config.stock_locations

    async def _ask(self, query: Query) -> Any:
        kind = query.kind
        parameters: list[tuple[str, str | int | float | bool | None]] = [
            ("d", _encode(domain(query))),
            ("s", query.limit),
        ]
        parameters += [("f", path) for path in paths_of(kind)]
        if query.number is None and kind.newest_first:
            parameters.append(("o", _encode([[kind.newest_first, "DESC"]])))
        headers = {}
        if self._locations:
            headers["x-tryton-context"] = _encode({"locations": self._locations})
        return _plain(await fetch_json(self._client, "GET", kind.entity, params=parameters, headers=headers))


def domain(query: Query) -> list[Any]:
    """Tryton's search domain; a list is a conjunction, and values cannot become conditions."""
    conditions: list[Any] = [[field, "=", value] for field, value in equalities(query)]
    if isinstance(query.kind.where, list):
        conditions.append(query.kind.where)
    return conditions


def _encode(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def _plain(value: Any) -> Any:
    """Tryton's JSON without its type marks."""
    if isinstance(value, dict):
        match value.get("__class__"):
            case "date":
                return f"{value['year']:04d}-{value['month']:02d}-{value['day']:02d}"
            case "datetime":
                day = f"{value['year']:04d}-{value['month']:02d}-{value['day']:02d}"
                return f"{day}T{value['hour']:02d}:{value['minute']:02d}:{value['second']:02d}"
            case "Decimal":
                return value["decimal"]
            case str():
                return None
        return {key: _plain(each) for key, each in value.items() if key not in ("id", "__name__")}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value
