"""What clients of business systems share that are asked over HTTP: secrets, the ownership filter, errors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from services.gateway.systems.base import Kind, Query, RecordKind, SystemOptions
from steersman.errors import UnavailableError
from steersman.net import guarded_client


class Remote:
    """See `services.gateway.systems.base.System`."""

    def __init__(self, config: SystemOptions, url: str, headers: Mapping[str, str]) -> None:
        self.name = config.name
        self.tenants: Sequence[str] = config.tenants
        self.kinds: Mapping[Kind, RecordKind] = config.kinds
        headers = {"accept": "application/json", **headers}
        self._client = guarded_client(base_url=url.rstrip("/") + "/", headers=headers, timeout=config.seconds)

    @abstractmethod
    async def _ask(self, query: Query) -> Any:
        """The list of rows, as the system answers it.

        Raises:
            httpx.HTTPError, ValueError, KeyError, TypeError: no answer, or another one.
        """

    async def fetch(self, query: Query) -> list[dict[str, Any]]:
        try:
            rows = await self._ask(query)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"{self.name} cannot be asked at the moment ({type(error).__name__})") from None
        if not isinstance(rows, list):
            raise UnavailableError(f"{self.name} answered something else than records")
        return [row for row in rows if isinstance(row, dict)]

    async def close(self) -> None:
        await self._client.aclose()


def paths_of(kind: RecordKind) -> list[str]:
    """All fields that a row must bring: the listed ones, its number and its owner."""
    return sorted({*kind.fields.values(), kind.number, *([kind.owner] if kind.owner else [])})


def equalities(query: Query) -> list[tuple[str, str]]:
    """(field, value) that every row must have: its owner before all, then its number where one was said."""
    wanted = []
    if query.owner is not None and query.kind.owner is not None:
        wanted.append((query.kind.owner, query.owner))
    if query.number is not None:
        wanted.append((query.kind.number, query.number))
    return wanted
