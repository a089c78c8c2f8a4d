"""Of several replicas one works: leader election by a Lease of the API server mock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import kmock
import pytest
from api_server import ApiServer
from fake_kube import alignment_run
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.exceptions import ApiException
from operators import Operator, until

from services.controller.config import LeaderElection
from services.controller.leader import lead
from steersman.errors import UnavailableError

ELECTION = LeaderElection(lease="controller", namespace="ml", duration_seconds=6)


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server, kmock.Server(server):
        yield server


def holder(api: ApiServer) -> str | None:
    lease = api.kube.find("Lease", "controller")
    return lease["spec"]["holderIdentity"] if lease else None


async def test_one_operator_works_and_the_other_goes_on_when_it_is_gone(api: ApiServer) -> None:
    async with Operator(api, election=ELECTION) as first:
        await until(lambda: first.working)
        leader = holder(api)
        async with Operator(api, election=ELECTION) as second:
            api.kube.put(alignment_run(stages=[{"sft": {}}, {"rewardModel": {}}]))
            await until(lambda: api.kube.find("Job", "demo-sft"))
            renewals = api.kube.writes.count(("replace", "Lease", "controller"))
            await until(lambda: api.kube.writes.count(("replace", "Lease", "controller")) > renewals + 1)
            assert not second.working
            assert holder(api) == leader
            await first.stop()
            await until(lambda: second.working)
            assert holder(api) != leader
            api.kube.finish_job("demo-sft")
            await until(lambda: api.kube.find("Job", "demo-reward-model"))
    jobs = [name for verb, kind, name in api.kube.writes if (verb, kind) == ("create", "Job")]
    assert jobs == ["demo-sft", "demo-reward-model"]


@pytest.mark.parametrize("how", ["error", "hang"])
async def test_who_cannot_renew_ends_its_work_before_another_begins(api: ApiServer, how: str) -> None:
    """The first replica's way to the Lease is cut; the second's is not."""
    told: list[str] = []

    async def cut(request: kmock.Request) -> Exception | None:
        if request.headers.get("replica") != "first" or not told:
            return None
        if how == "hang":
            await asyncio.sleep(ELECTION.duration_seconds)
        return ApiException(status=503, reason="Service Unavailable")

    async def replica(name: str) -> None:
        async def work() -> None:
            told.append(f"{name} begins")
            try:
                await asyncio.Event().wait()
            finally:
                told.append(f"{name} ends")

        async with ApiClient(Configuration(host=str(api.url).rstrip("/")), "replica", name) as client:
            await lead(client, ELECTION, work)

    api.intercept = cut
    first = asyncio.create_task(replica("first"))
    await until(lambda: told)
    second = asyncio.create_task(replica("second"))
    await until(lambda: len(told) == 3)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert told == ["first begins", "first ends", "second begins", "second ends"]
    with pytest.raises(UnavailableError, match="the Lease ml/controller is lost"):
        await first


async def test_without_election_the_work_begins_at_once_and_its_error_is_the_operators() -> None:
    async def work() -> None:
        raise UnavailableError("the API server is gone")

    with pytest.raises(UnavailableError, match="the API server is gone"):
        await lead(ApiClient(Configuration(host="http://127.0.0.1:9")), None, work)
