"""Reads from OData v4 services (OASIS OData 4.01, part 2: URL conventions)."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import quote, urlencode

from services.gateway.fetching import fetch_json
from services.gateway.systems.base import Kind, Query, RecordKind, SystemOptions
from services.gateway.systems.remote import Remote, equalities, paths_of
from steersman.environment import header_secret_in


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


class OData(Remote):
    """See `services.gateway.systems.base.System`."""

    def __init__(self, config: ODataSystem) -> None:
        headers = {"odata-version": "4.0"}
        if config.authorization_env:
            field = f"tools.systems.{config.name}.authorizationEnv"
            headers["authorization"] = header_secret_in(config.authorization_env, field, words=True)
        super().__init__(config, config.url, headers)

    async def _ask(self, query: Query) -> Any:
        kind = query.kind
        paths = paths_of(kind)
        expand: dict[str, list[str]] = {}
        for path in paths:
            navigation, below, field = path.partition("/")
            if below:
                expand.setdefault(navigation, []).append(field)
        parameters = {"$select": ",".join(path for path in paths if "/" not in path), "$top": str(query.limit)}
        if condition := conditions(query):
            parameters["$filter"] = condition
        if expand:
            parameters["$expand"] = ",".join(f"{name}($select={','.join(fields)})" for name, fields in expand.items())
        if query.number is None and kind.newest_first:
            parameters["$orderby"] = f"{kind.newest_first} desc"
        # OData wants %20 for a space, not the plus sign of forms.
        query_string = urlencode(parameters, quote_via=quote, safe="$/(),")
        return (await fetch_json(self._client, "GET", f"{kind.entity}?{query_string}"))["value"]


def conditions(query: Query) -> str:
    """`$filter` with values as string literals: a quote inside is doubled and cannot end the literal."""
    parts = [f"{field} eq {literal(value)}" for field, value in equalities(query)]
    if isinstance(query.kind.where, str):
        parts.append(f"({query.kind.where})")
    return " and ".join(parts)


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
