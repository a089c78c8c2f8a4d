"""Reads from OData v4 services (OASIS OData 4.01, part 2: URL conventions)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote, urlencode

import httpx

from services.gateway.fetching import fetch_json
from services.gateway.systems.base import Kind, Query, RecordKind, SystemOptions
from steersman.errors import ConfigError, UnavailableError
from steersman.net import guarded_client


class ODataSystem(SystemOptions):
    """An OData v4 service, for example of SAP S/4HANA or CAP."""

    type: Literal["odata"]
    url: str
    """Of the service, for example https://s4/sap/opu/odata4/.../0001."""
    authorization_env: str | None = None
    """Environment variable with the whole Authorization header."""
    kinds: dict[Kind, RecordKind]
    """What S/4HANA calls order, delivery ... differs by release, so there is no default."""

    def open(self) -> OData:
        return OData(self)


class OData:
    """See `services.gateway.systems.base.System`."""

    def __init__(self, config: ODataSystem) -> None:
        headers = {"accept": "application/json", "odata-version": "4.0"}
        if config.authorization_env:
            headers["authorization"] = os.environ.get(config.authorization_env, "")
            if not headers["authorization"]:
                raise ConfigError(
                    f"tools.systems.{config.name}.authorizationEnv: the environment variable "
                    f"{config.authorization_env} is not set"
                )
        self.name = config.name
        self.tenants: Sequence[str] = config.tenants
        self.kinds: Mapping[Kind, RecordKind] = config.kinds
        self._client = guarded_client(base_url=config.url.rstrip("/") + "/", headers=headers, timeout=config.seconds)

    async def fetch(self, query: Query) -> list[dict[str, Any]]:
        kind = query.kind
        paths = {*kind.fields.values(), kind.number, *([kind.owner] if kind.owner else [])}
        own = sorted(path for path in paths if "/" not in path)
        expand: dict[str, list[str]] = {}
        for path in sorted(path for path in paths if "/" in path):
            navigation, _, field = path.partition("/")
            expand.setdefault(navigation, []).append(field)
        parameters = {"$select": ",".join(own), "$top": str(query.limit)}
        if condition := conditions(query):
            parameters["$filter"] = condition
        if expand:
            parameters["$expand"] = ",".join(f"{name}($select={','.join(fields)})" for name, fields in expand.items())
        if query.number is None and kind.newest_first:
            parameters["$orderby"] = f"{kind.newest_first} desc"
        try:
            # OData wants %20 for a space, not the plus sign of forms.
            query_string = urlencode(parameters, quote_via=quote, safe="$/(),")
            rows = (await fetch_json(self._client, "GET", f"{kind.entity}?{query_string}"))["value"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"{self.name} cannot be asked at the moment ({type(error).__name__})") from None
        if not isinstance(rows, list):
            raise UnavailableError(f"{self.name} answered something else than records")
        return [row for row in rows if isinstance(row, dict)]

    async def close(self) -> None:
        await self._client.aclose()


def conditions(query: Query) -> str:
    """`$filter` with values as string literals: a quote inside is doubled and cannot end the literal."""
    parts = []
    if query.owner is not None and query.kind.owner is not None:
        parts.append(f"{query.kind.owner} eq {literal(query.owner)}")
    if query.number is not None:
        parts.append(f"{query.kind.number} eq {literal(query.number)}")
    if isinstance(query.kind.where, str):
        parts.append(f"({query.kind.where})")
    return " and ".join(parts)


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
