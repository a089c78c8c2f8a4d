"""What probes and `helm test` are told: `/healthz` lives, `/readyz` watches and may act, `/dry-look` would be obeyed.

A replica that waits for the Lease is ready when it could take over: it reaches the API server and has its rights.
The leader is ready when it also watches, and has listed the runs of every namespace lately.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from http import HTTPStatus

import aiohttp
from kubernetes.aio.client.exceptions import ApiException

from services.controller import objects
from services.controller.actions import Json
from services.controller.config import ControllerConfig
from services.controller.kube import RIGHTS, Kube, explain
from services.controller.model import Settings
from services.controller.plan import parse_run
from steersman.errors import ConfigError

RIGHTS_SECONDS = 300.0
"""How long granted rights are believed; missing ones are asked for again after a tenth of it."""
REQUEST_SECONDS = 5.0
ANSWER_SECONDS = 60.0
UNREACHABLE = (ApiException, aiohttp.ClientError, TimeoutError, OSError)
"""Errors of a call to the API server."""


class Health:
    """What this replica knows about its own fitness."""

    def __init__(self, kube: Kube, config: ControllerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.leading = False
        self.watching = threading.Event()
        """kopf's handlers and watches have started; kopf sets it."""
        self.down: Mapping[str, str] = {}
        """Background tasks that died and do not run yet, and why."""
        self._kube = kube
        self._namespaces = config.namespaces
        self._patience = 3 * config.resync_seconds + 30.0
        self._clock = clock
        self._listed: dict[str, float] = {}
        self._refused: str | None = None
        self._asked_at: float | None = None

    def saw_runs(self, namespace: str) -> None:
        """The runs of a namespace were listed just now."""
        self._listed[namespace] = self._clock()

    async def problem(self) -> str | None:
        """Why this replica cannot work; None when it can."""
        refused = await self._rights_problem()
        if refused is not None or not self.leading:
            return refused
        if not self.watching.is_set():
            return "the watches have not started"
        if self.down:
            return "; ".join(f"{name} does not run ({why})" for name, why in self.down.items())
        silent = [name for name in self._namespaces if self._clock() - self._listed.get(name, -1e9) > self._patience]
        return f"the runs of {', '.join(silent)} could not be listed lately" if silent else None

    async def _rights_problem(self) -> str | None:
        valid = RIGHTS_SECONDS if self._refused is None else RIGHTS_SECONDS / 10
        if self._asked_at is None or self._clock() - self._asked_at > valid:
            self._refused = await self._ask_rights()
            self._asked_at = self._clock()
        return self._refused

    async def _ask_rights(self) -> str | None:
        asked = [(name, kind, verb) for name in self._namespaces for kind, verbs in RIGHTS.items() for verb in verbs]
        try:
            granted = await asyncio.gather(*(self._kube.may(*question) for question in asked))
        except UNREACHABLE as error:
            return f"the API server does not answer ({describe(error)})"
        missing = [
            f"{verb} {kind} in {name}" for (name, kind, verb), may in zip(asked, granted, strict=True) if not may
        ]
        return f"the ServiceAccount may not {', '.join(missing)}; check the chart's rbac.create" if missing else None


def describe(error: BaseException) -> str:
    """What went wrong with a call, in a few words."""
    return explain(error) if isinstance(error, ApiException) else f"{type(error).__name__} {error}".strip()


async def dry_look(kube: Kube, settings: Settings, namespaces: Iterable[str]) -> list[str]:
    """Lets the API server judge every object that a run would be given, without making one.

    Returns:
        What was accepted, one line an object.

    Raises:
        ApiException: an object is refused, for example by Pod Security, a quota, a webhook or missing rights.
    """
    accepted = []
    for namespace in namespaces:
        for body in _sample_objects(namespace, settings):
            await kube.create(body["kind"], namespace, body, dry_run=True)
            accepted.append(f"{body['kind']} {namespace}/{body['metadata']['name']}: accepted")
    return accepted


def _sample_objects(namespace: str, settings: Settings) -> list[Json]:
    """The manifest, the Job and the three services of a small run."""
    run: Json = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {
            "name": "steersman-dry-look",
            "namespace": namespace,
            "uid": "00000000-0000-0000-0000-000000000000",
        },
        "spec": {"data": {"demo": {}}, "stages": [{"sft": {}}, {"rewardModel": {}}, {"rl": {"steps": 1}}]},
    }
    manifest = parse_run(run)
    bodies = objects.lasting_objects(run, manifest, settings) + objects.stage_objects(run, manifest, 0, settings)
    for service, config in objects.needs(run, manifest, 2, settings.storage).items():
        bodies += objects.service_objects(run, manifest, service, config, settings, "rl")
    return bodies


class Probes:
    """A few lines of HTTP on a port of its own: no framework, a limit for every request."""

    def __init__(self, health: Health, look: Callable[[], Awaitable[list[str]]]) -> None:
        """`look` makes a dry look."""
        self._health = health
        self._look = look
        self._looking = asyncio.Lock()

    async def answer(self, path: str) -> tuple[int, str]:
        """Status and text for a path."""
        match path:
            case "/healthz":
                return HTTPStatus.OK, "alive"
            case "/readyz":
                problem = await self._health.problem()
                state = "leads" if self._health.leading else "waits for the Lease"
                return (HTTPStatus.SERVICE_UNAVAILABLE, problem) if problem else (HTTPStatus.OK, state)
            case "/dry-look":
                try:
                    async with self._looking:  # one at a time: it costs the API server ten calls
                        return HTTPStatus.OK, "\n".join(await self._look())
                except UNREACHABLE as error:
                    return HTTPStatus.SERVICE_UNAVAILABLE, f"a run would not be executed: {describe(error)}"
        return HTTPStatus.NOT_FOUND, "there are /healthz, /readyz and /dry-look"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request; a caller that does not send it whole in time is cut off."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            async with asyncio.timeout(REQUEST_SECONDS):
                request = await reader.readuntil(b"\r\n\r\n")
            _, _, rest = request.partition(b" ")
            path = rest.partition(b" ")[0].partition(b"?")[0].decode("ascii", "replace")
            async with asyncio.timeout(ANSWER_SECONDS):
                status, text = await self.answer(path)
            body = f"{text}\n".encode()
            head = f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            async with asyncio.timeout(REQUEST_SECONDS):
                await writer.drain()
        writer.close()

    @contextlib.asynccontextmanager
    async def on(self, port: int | None, host: str | None = None) -> AsyncIterator[None]:
        """Listens, also in a replica that waits for the Lease; None: nowhere.

        Args:
            host: address; None: all, those of IPv6 included.

        Raises:
            ConfigError: the port is taken.
        """
        if port is None:
            yield
            return
        try:
            server = await asyncio.start_server(self.serve, host, port)
        except OSError as error:
            raise ConfigError(f"healthPort: {port} cannot be listened on ({error.strerror}); choose another") from None
        async with server:
            yield
