"""Helpers for tests and benchmarks of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from services.gateway.config import GatewayConfig
from services.gateway.server import Gateway
from steersman.config.base import load_model


def gateway_config(*endpoints: str, **changes: Any) -> GatewayConfig:
    """A configuration for free loopback ports; `changes` are YAML fields in camelCase."""
    policy = {"endpoints": list(endpoints), "probeSeconds": 0.1, "connectTimeoutSeconds": 5}
    data = {"port": 0, "grpcPort": 0, "policy": {**policy, **changes.pop("policy", {})}, **changes}
    return load_model(GatewayConfig, data, "test")


@asynccontextmanager
async def running_gateway(config: GatewayConfig) -> AsyncIterator[Gateway]:
    """A gateway in this event loop."""
    gateway = Gateway(config)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.drain()


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for a condition; TimeoutError when it does not come."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serve_app(app: Any) -> AsyncIterator[str]:
    """An ASGI application on a free loopback port; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[Any], seconds: float = 150) -> None:
    """Waits until a process listens; AssertionError when it ends or does not come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}")
