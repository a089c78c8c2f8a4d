"""An API server over HTTP: kmock speaks the protocol, `FakeKube` keeps the objects and their rules."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import kmock
from fake_kube import FakeKube, Json
from kubernetes.aio.client.exceptions import ApiException

from services.controller.kube import RESOURCES

KIND_OF = {kmock.resource(item.group, item.version, item.plural): kind for kind, item in RESOURCES.items()}
KIND_OF[kmock.resource("coordination.k8s.io", "v1", "leases")] = "Lease"
REVIEWS = kmock.resource("authorization.k8s.io", "v1", "selfsubjectaccessreviews")
SUBRESOURCES = {"Pod": ("status", "log"), "Event": (), "Service": (), "ConfigMap": ()}

Intercept = Callable[[kmock.Request], BaseException | Awaitable[BaseException | None] | None]


class ApiServer(kmock.KubernetesScaffold):
    """Lists, watches, merge patches, resource versions, subresources, selectors, conflicts, owners.

    `kube` is the state: what a test changes there is seen by every watch.
    """

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.kube = FakeKube()
        self.kube.listeners.append(self._changed)
        self.intercept: Intercept | None = None
        """Sees every request before it is served; what it returns is raised."""
        self.denied: set[tuple[str, str]] = set()
        """Rights that the caller does not have: verb and plural."""
        self.dry_runs: list[str] = []
        """Kinds of objects that were created for trial."""
        self.deliveries = 1
        """How often a watch delivers every event."""
        self.watches_opened = 0
        self._watches: dict[str, set[asyncio.Queue[Json | None]]] = {kind: set() for kind in KIND_OF.values()}
        self._history: list[tuple[str, Json]] = []
        verbs = {"get", "list", "watch", "create", "patch", "delete"}
        for resource, kind in KIND_OF.items():
            self.resources[resource] = {
                "kind": kind,
                "singular": kind.lower(),
                "namespaced": True,
                "verbs": verbs,
                "subresources": set(SUBRESOURCES.get(kind, ("status",))),
            }
        # Every API server has them, and kopf opens no watch before it knows the kind `namespaces`.
        everywhere = {"kind": "Namespace", "namespaced": False, "verbs": verbs, "subresources": set()}
        self.resources[kmock.resource("", "v1", "namespaces")] = everywhere
        reviews = {"kind": "SelfSubjectAccessReview", "namespaced": False, "verbs": verbs, "subresources": set()}
        self.resources[REVIEWS] = reviews
        self.fallback[kmock.action.CREATE, REVIEWS] << self._review
        for action, serve in (
            (kmock.action.LIST, self._list),
            (kmock.action.WATCH, self._watch),
            (kmock.action.FETCH, self._fetch),
            (kmock.action.CREATE, self._create),
            (kmock.action.UPDATE, self._update),
            (kmock.action.DELETE, self._remove),
        ):
            self.fallback[action] << self._guarded(serve)
        self.fallback[kmock.method.PUT] << self._guarded(self._replace)

    def break_watches(self, *, gone: bool) -> None:
        """Ends every open watch: with 410 Gone, as after a compaction, or without a word, as when a proxy restarts."""
        expired = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired"}
        for queues in self._watches.values():
            for queue in queues:
                if gone:
                    queue.put_nowait({"type": "ERROR", "object": expired})
                queue.put_nowait(None)

    def _guarded(self, serve: Callable[[kmock.Request, str], Any]) -> Callable[[kmock.Request], Any]:
        async def answer(request: kmock.Request) -> Any:
            problem = self.intercept(request) if self.intercept is not None else None
            if inspect.isawaitable(problem):
                problem = await problem
            try:
                if problem is not None:
                    raise problem
                return await serve(request, KIND_OF[request.resource])
            except ApiException as error:
                raise kmock.KubernetesError(error.status, error.reason, error.reason) from None

        return answer

    async def _list(self, request: kmock.Request, kind: str) -> Json:
        items = await self.kube.list(kind, request.namespace or "", request.params.get("labelSelector"))
        return {"metadata": {"resourceVersion": self._version()}, "items": items}

    async def _watch(self, request: kmock.Request, kind: str) -> AsyncIterator[Any]:
        queue: asyncio.Queue[Json | None] = asyncio.Queue()
        since = int(request.params.get("resourceVersion", "0"))
        for changed, event in self._history[since:]:  # what happened between the list and this watch
            if changed == kind:
                queue.put_nowait(event)
        self._watches[kind].add(queue)
        self.watches_opened += 1

        async def events() -> AsyncIterator[Any]:
            try:
                yield b""  # sends the headers
                while (event := await queue.get()) is not None:
                    for _ in range(self.deliveries):
                        yield event
            finally:
                self._watches[kind].discard(queue)

        return events()

    async def _fetch(self, request: kmock.Request, kind: str) -> Any:
        if request.subresource == "log":
            text = await self.kube.pod_log(request.namespace or "", request.name, int(request.params["tailLines"]))
            return text.encode()  # headers of a response would stay for those that come after it
        found = await self.kube.get(kind, request.namespace or "", request.name)
        if found is None:
            raise ApiException(status=404, reason="Not Found")
        return found

    def _review(self, request: kmock.Request) -> Json:
        asked = request.data["spec"]["resourceAttributes"]
        return {**request.data, "status": {"allowed": (asked["verb"], asked["resource"]) not in self.denied}}

    async def _create(self, request: kmock.Request, kind: str) -> Json:
        name = request.data["metadata"]["name"]
        if request.params.get("dryRun") == "All":
            self.dry_runs.append(kind)
            return request.data
        if not await self.kube.create(kind, request.namespace or "", {"kind": kind, **request.data}):
            raise ApiException(status=409, reason="AlreadyExists")
        return self.kube.objects[kind, request.namespace, name]

    async def _update(self, request: kmock.Request, kind: str) -> Json:
        if request.headers["Content-Type"] == "application/apply-patch+yaml":
            if request.params.get("fieldManager") == "steersman-controller":
                return await self.kube.apply(kind, request.namespace or "", request.name, request.data)
            return await self._apply(request, kind)
        if request.headers["Content-Type"] != "application/merge-patch+json":
            raise ApiException(status=415, reason="Unsupported Media Type")
        return await self.kube.patch(kind, request.namespace or "", request.name, request.data, request.subresource)

    async def _apply(self, request: kmock.Request, kind: str) -> Json:
        """Server-side apply by the one manager of the whole spec: creates, or replaces the spec, nulls included."""
        if not request.params.get("fieldManager"):
            raise ApiException(status=400, reason="BadRequest")
        found = await self.kube.get(kind, request.namespace or "", request.name)
        if found is None:
            return await self._create(request, kind)
        body = {**found, "spec": request.data["spec"]}
        return await self.kube.replace(kind, request.namespace or "", request.name, body)

    async def _replace(self, request: kmock.Request, kind: str) -> Json:
        return await self.kube.replace(kind, request.namespace or "", request.name, request.data)

    async def _remove(self, request: kmock.Request, kind: str) -> Json:
        if (kind, request.namespace, request.name) not in self.kube.objects:
            raise ApiException(status=404, reason="Not Found")
        await self.kube.delete(kind, request.namespace or "", request.name)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _version(self) -> str:
        return str(len(self._history))

    def _changed(self, change: str, body: Json) -> None:
        kind = body["kind"]
        seen = copy.deepcopy(body)
        # Versions of the stream, not of the object: a watch that is opened again goes on after the last one it saw.
        seen["metadata"]["resourceVersion"] = str(len(self._history) + 1)
        event = {"type": change, "object": seen}
        self._history.append((kind, event))
        for queue in self._watches.get(kind, ()):
            queue.put_nowait(event)
