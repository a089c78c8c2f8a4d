"""Lists are kept until a watch says that something changed: looks at runs that only wait cost no list and no log.

A list is answered from here while no watch and no write of ours has touched its kind, and not longer than
`REFRESH_SECONDS`. So what a look sees is never older than what the controller was told or did itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

from services.controller.kube import Json, Kube
from services.controller.model import RUN_LABEL

WATCHED = ("AlignmentRun", "Job", "Pod", "StatefulSet")
REFRESH_SECONDS = 60.0
"""A watch that is opened again does not tell what went meanwhile; after this long the API server is asked anyway."""
LOG_SECONDS = 10.0
"""How old the end of a running pod's log may be."""

Place = tuple[str, str]
"""Kind and namespace."""


class CachedKube(Kube):
    """Has the interface of `Kube`."""

    def __init__(self, kube: Kube, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._clock = clock
        self._items: dict[Place, list[Json]] = {}
        self._fresh_until: dict[Place, float] = {}
        self._changes: dict[Place, int] = {}
        self._logs: dict[tuple[str, str, int], tuple[float, str]] = {}

    def changed(self, kind: str, namespace: str) -> None:
        """A watch, or a write of ours, has touched a kind: the next list asks the API server."""
        self._changes[kind, namespace] = self._changes.get((kind, namespace), 0) + 1
        self._fresh_until.pop((kind, namespace), None)

    async def list(self, kind: str, namespace: str, selector: str | None = None) -> list[Json]:
        place = (kind, namespace)
        if kind not in WATCHED:
            return await self._kube.list(kind, namespace, selector)
        if self._clock() >= self._fresh_until.get(place, 0.0):
            seen = self._changes.get(place, 0)
            self._items[place] = await self._kube.list(kind, namespace, None if kind == "AlignmentRun" else RUN_LABEL)
            if self._changes.get(place, 0) == seen:
                self._fresh_until[place] = self._clock() + REFRESH_SECONDS
        wanted = dict(term.split("=", 1) for term in selector.split(",")) if selector else {}
        return [
            copy.deepcopy(item)
            for item in self._items[place]
            if wanted.items() <= (item["metadata"].get("labels") or {}).items()
        ]

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        return await self._kube.get(kind, namespace, name)

    async def create(self, kind: str, namespace: str, body: Json, *, dry_run: bool = False) -> bool:
        try:
            return await self._kube.create(kind, namespace, body, dry_run=dry_run)
        finally:
            self.changed(kind, namespace)

    async def patch(self, kind: str, namespace: str, name: str, body: Json, subresource: str | None = None) -> Json:
        try:
            return await self._kube.patch(kind, namespace, name, body, subresource)
        finally:
            self.changed(kind, namespace)

    async def apply(self, kind: str, namespace: str, name: str, body: Json) -> Json:
        try:
            return await self._kube.apply(kind, namespace, name, body)
        finally:
            self.changed(kind, namespace)

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        try:
            await self._kube.delete(kind, namespace, name)
        finally:
            self.changed(kind, namespace)

    async def may(self, namespace: str, kind: str, verb: str) -> bool:
        return await self._kube.may(namespace, kind, verb)

    async def pod_log(self, namespace: str, name: str, lines: int) -> str:
        key, now = (namespace, name, lines), self._clock()
        known = self._logs.get(key)
        if known is None or known[0] <= now:
            self._logs = {other: entry for other, entry in self._logs.items() if entry[0] > now}
            self._logs[key] = (now + LOG_SECONDS, await self._kube.pod_log(namespace, name, lines))
        return self._logs[key][1]
