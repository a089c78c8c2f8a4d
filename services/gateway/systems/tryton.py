"""Reads from Tryton through its REST interface (docs.tryton.org: trytond, topics, REST API)."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import httpx
from pydantic import Field

from services.gateway.fetching import fetch_json
from services.gateway.systems.base import Kind, Query, RecordKind, SystemOptions
from steersman.errors import ConfigError, UnavailableError
from steersman.net import guarded_client


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


class Tryton:
    """See `services.gateway.systems.base.System`."""

    def __init__(self, config: TrytonSystem) -> None:
        key = os.environ.get(config.key_env, "")
        if not key:
            raise ConfigError(
                f"tools.systems.{config.name}.keyEnv: the environment variable {config.key_env} is not set"
            )
        self.name = config.name
        self.tenants: Sequence[str] = config.tenants
        self.kinds: Mapping[Kind, RecordKind] = config.kinds
        self._locations = config.stock_locations
        self._client = guarded_client(
            base_url=f"{config.url.rstrip('/')}/{config.database}/rest/model/",
            headers={"authorization": f"bearer {key}", "accept": "application/json"},
            timeout=config.seconds,
        )

    async def fetch(self, query: Query) -> list[dict[str, Any]]:
        kind = query.kind
        paths = {*kind.fields.values(), kind.number, *([kind.owner] if kind.owner else [])}
        parameters: list[tuple[str, str | int | float | bool | None]] = [
            ("d", _encode(domain(query))),
            ("s", query.limit),
        ]
        parameters += [("f", path) for path in sorted(paths)]
        if query.number is None and kind.newest_first:
            parameters.append(("o", _encode([[kind.newest_first, "DESC"]])))
        headers = {}
        if self._locations:
            headers["x-tryton-context"] = _encode({"locations": self._locations})
        try:
            rows = await fetch_json(self._client, "GET", kind.entity, params=parameters, headers=headers)
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError(f"{self.name} cannot be asked at the moment ({type(error).__name__})") from None
        if not isinstance(rows, list):
            raise UnavailableError(f"{self.name} answered something else than records")
        return [_plain(row) for row in rows if isinstance(row, dict)]

    async def close(self) -> None:
        await self._client.aclose()


def domain(query: Query) -> list[Any]:
    """Tryton's search domain; a list is a conjunction, and values cannot become conditions."""
    conditions: list[Any] = []
    if query.owner is not None and query.kind.owner is not None:
        conditions.append([query.kind.owner, "=", query.owner])
    if query.number is not None:
        conditions.append([query.kind.number, "=", query.number])
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
