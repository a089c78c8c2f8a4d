"""Connections of clients that compute for long between calls."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steersman.rpc import server as rpc_server
from steersman.rpc.server import Server, ServerConfig, channel_options


async def test_servers_bear_the_keepalive_pings_of_our_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    # A thousand times as fast: pings every 30 ms where a server allows one in 10 ms.
    intervals = ("grpc.keepalive_time_ms", "grpc.http2.min_ping_interval_without_data_ms")
    options = [(name, value // 1000 if name in intervals else value) for name, value in channel_options(1 << 20)]
    assert [value for name, value in options if name in intervals] == [30, 10]
    monkeypatch.setattr(rpc_server, "channel_options", lambda max_message_bytes: options)
    server = Server(ServerConfig(drain_seconds=0), [(0, [])])
    await server.start()
    await server.ready()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports[0]}", options=options) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            # Pings go out about once a second at most, and the third one that is taken for abuse ends the connection.
            await asyncio.sleep(4)
            assert channel.get_state() == grpc.ChannelConnectivity.READY
    finally:
        await server.drain()
