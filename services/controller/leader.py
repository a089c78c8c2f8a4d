"""Leader election by a Lease: of several replicas one works.

A leader ends its work before another one may begin. With a Lease of d seconds it renews every d/5, a call may take
d/10, and it gives up after d/2 without success: its last try begins at most 0.7 d after the last renewal and takes two
calls (0.2 d); others wait d from the renewal that they saw.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient, V1Lease, V1ObjectMeta
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection import electionconfig, leaderelection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from services.controller.config import LeaderElection
from steersman.errors import UnavailableError

log = logging.getLogger("steersman.controller")


class _Lock(LeaseLock):
    """A call that hangs or finds no server has failed; the client's own knows only answers."""

    def __init__(self, name: str, namespace: str, identity: str, client: ApiClient, seconds: float) -> None:
        super().__init__(name, namespace, identity, client)
        self._seconds = seconds

    async def get(self, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(self._seconds):
                return await super().get(*arguments)
        except (TimeoutError, aiohttp.ClientError) as error:
            return False, ApiException(reason=f"{type(error).__name__} {error}")

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        """The client's own asks for `pretty=True`, which its own API refuses."""
        body = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))

        async def call() -> bool:
            await self.api_instance.create_namespaced_lease(namespace, body)
            return True

        return await self._in_time(call())

    async def update(self, *arguments: Any, **named: Any) -> bool:
        return await self._in_time(super().update(*arguments, **named))

    async def _in_time(self, call: Awaitable[bool]) -> bool:
        try:
            async with asyncio.timeout(self._seconds):
                return await call
        except (TimeoutError, aiohttp.ClientError, ApiException) as error:
            log.warning("the Lease %s/%s cannot be written (%r)", self.namespace, self.name, error)
            return False


async def lead(client: ApiClient, election: LeaderElection | None, work: Callable[[], Awaitable[None]]) -> None:
    """Does the work while the Lease is held; without leader election, at once.

    Raises:
        UnavailableError: the Lease is lost; the work was cancelled, the process must start anew.
    """
    if election is None:
        await work()
        return
    duration = election.duration_seconds
    identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    elected = asyncio.Event()

    async def begin() -> None:
        elected.set()

    async def wait_and_work() -> None:
        await elected.wait()
        await work()

    settings = electionconfig.Config(
        _Lock(election.lease, election.namespace, identity, client, duration / 10),
        lease_duration=duration,
        renew_deadline=duration / 2,
        retry_period=duration / 5,
        onstarted_leading=begin,
        onstopped_leading=None,  # type: ignore[arg-type]
    )
    leader = asyncio.create_task(leaderelection.LeaderElection(settings).run())
    worker = asyncio.create_task(wait_and_work())
    try:
        await asyncio.wait({leader, worker}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            lost = UnavailableError(f"the Lease {election.namespace}/{election.lease} is lost; starting anew")
            raise lost from leader.exception()
        worker.result()
    finally:
        worker.cancel()
        leader.cancel()
        await asyncio.gather(worker, leader, return_exceptions=True)
