"""One remote service: waited for when it is away, asked again when it fails, never waited for without end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import cache
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steersman.errors import CancelledError, SteersmanError, UnavailableError, from_grpc
from steersman.loop_thread import LoopThread
from steersman.rpc.client import Access, open_aio_channel

AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
"""The service is not there: wait for it."""
FAILING = (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
"""It is there and could not do it: ask again a few times."""
TRIES = 4
_FIRST_PAUSE = 0.25

T = TypeVar("T")
Note = Callable[[str], None]


@cache
def calls() -> LoopThread:
    """The event loop that all calls to services run on; the process's own, started when it is first needed."""
    return LoopThread("services")


class FailingError(SteersmanError):
    """A service answered `TRIES` times that it could not do it, or with something that is no answer."""

    grpc_code = "INTERNAL"


class Remote:
    """Channels to one service, data plane first."""

    def __init__(
        self, targets: tuple[str, ...], service: str, patience: float, note: Note, access: Access = Access()
    ) -> None:
        """Args:
        targets: host:port of its listeners.
        service: full name of the first listener's service, for its health.
        patience: seconds to wait for a service that is away.
        access: certificates and token.
        """
        self.target = targets[0]
        self.name = f"{service} at {self.target}"
        self._service = service
        self._patience = patience
        self._note = note
        self._closed = False
        self.channels: tuple[grpc.aio.Channel, ...] = calls().run(_open(targets, access))

    def close(self) -> None:
        """Ends running calls and every wait: nobody wants the answers any more."""
        self._closed = True
        calls().run(self._close())

    async def _close(self) -> None:
        for channel in self.channels:
            await channel.close()

    def wait(self) -> None:
        """Raises UnavailableError when the service is not ready within the patience."""
        calls().run(self.ready())

    async def ready(self) -> None:
        stub = health_pb2_grpc.HealthStub(self.channels[0])
        start = told = time.monotonic()
        state = "no answer"
        while (now := time.monotonic()) - start < self._patience:
            self.check_open()
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=self._service), timeout=5)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                state = "NOT_SERVING"
            except grpc.RpcError as error:
                state = error.details() or error.code().name
            except (asyncio.CancelledError, grpc.aio.UsageError):
                self.check_open()  # grpc's answer to a call on a closed channel
                raise
            if now - told >= 3:
                told = now
                self._note(f"waiting for {self._service} at {self.target} ({now - start:.0f} s)")
            await asyncio.sleep(min(0.25, self._patience))
        raise UnavailableError(
            f"{self.target}: {self._service} is not ready after {self._patience:.0f} s ({state}); look at its log and "
            "its endpoint"
        )

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """Repeats a call while the service is away, for at most the patience, and some times when it fails.

        Raises:
            FailingError: it failed `TRIES` times.
            SteersmanError: it refused, or stayed away.
        """
        failing_since: float | None = None
        failures = 0
        while True:
            self.check_open()
            try:
                return await make()
            except grpc.RpcError as error:
                self.check_open()
                code = error.code()
                if code in FAILING:
                    failures += 1
                    if failures == TRIES:
                        raise FailingError(f"{self.name}: {error.details() or code.name}") from None
                    await asyncio.sleep(_FIRST_PAUSE * 2 ** (failures - 1))
                    continue
                now = time.monotonic()
                failing_since = failing_since or now
                if code not in AWAY or now - failing_since > self._patience:
                    raise from_grpc(error, self.name) from None
                await self.back()
            except asyncio.CancelledError:
                self.check_open()
                raise

    async def back(self) -> None:
        """Waits for a service that went away."""
        self._note(f"{self.name} went away; waiting for it")
        await asyncio.sleep(0.5)
        await self.ready()

    def check_open(self) -> None:
        if self._closed:
            raise CancelledError(f"{self.name} is not needed any more")


async def _open(targets: tuple[str, ...], access: Access) -> tuple[grpc.aio.Channel, ...]:
    return tuple(open_aio_channel(target, access.tls, access.token) for target in targets)
