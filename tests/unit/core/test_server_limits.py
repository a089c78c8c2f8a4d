"""A server bounds the calls that run at the same time, and stays alive for its probes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.gateway.testing import gateway_config, running_gateway
from steersman.errors import RateLimitedError, from_grpc
from steersman.rpc.server import Server, ServerConfig, address_of
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import policy_pb2, policy_pb2_grpc

NAME = "steersman.v1.PolicyService"


class Slow(policy_pb2_grpc.PolicyServiceServicer):
    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.go.wait()
        yield policy_pb2.GenerateResponse(prompt_index=7)

    async def GetPolicyInfo(self, request: Any, context: Any) -> Any:
        await self.go.wait()
        return policy_pb2.GetPolicyInfoResponse(engine="slow")


async def test_one_call_too_many_is_told_when_to_come_back() -> None:
    slow = Slow()
    register = policy_pb2_grpc.add_PolicyServiceServicer_to_server
    server = Server(ServerConfig(max_concurrent_calls=2, drain_seconds=0), [(0, [(register, slow, NAME)])])
    await server.start()
    await server.ready()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports[0]}") as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        stream = stub.Generate(policy_pb2.GenerateRequest())
        reading = asyncio.create_task(stream.read())
        unary = asyncio.create_task(_call(stub))
        await asyncio.sleep(0.2)
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest(), timeout=10)
            back = from_grpc(caught.value, "policy")
            assert isinstance(back, RateLimitedError)
            assert back.retry_after == 1.0
        probe = health_pb2_grpc.HealthStub(channel)
        answer = await probe.Check(health_pb2.HealthCheckRequest(service=NAME), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        slow.go.set()
        assert (await reading).prompt_index == 7
        assert (await unary).engine == "slow"
        assert await stream.read() is grpc.aio.EOF
        assert (await _call(stub)).engine == "slow", "ended calls make room"
    await server.drain()


async def _call(stub: Any) -> Any:
    return await stub.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest(), timeout=30)


async def test_servers_listen_on_ipv6_alone() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    register = policy_pb2_grpc.add_PolicyServiceServicer_to_server
    server = Server(ServerConfig(host="::1", drain_seconds=0), [(0, [(register, Slow(), NAME)])])
    await server.start()
    await server.ready()
    async with grpc.aio.insecure_channel(address_of("::1", server.ports[0])) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.drain()


@pytest.mark.parametrize("host", ["::1", "::"])
async def test_the_gateway_answers_on_ipv6(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with (
        serve_policy(FakePolicy()) as endpoint,
        running_gateway(gateway_config(endpoint, host=host, requireApiKey=False)) as gateway,
        httpx.AsyncClient() as http,
    ):
        assert (await http.get(f"http://[::1]:{gateway.port}/healthz")).status_code == 200
        if host == "::":
            assert (await http.get(f"http://127.0.0.1:{gateway.port}/healthz")).status_code == 200
