"""Helpers for tests and benchmarks of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from services.gateway.config import GatewayConfig
from services.gateway.server import Gateway
from steersman.config.base import load_model


def gateway_config(*endpoints: str, **changes: Any) -> GatewayConfig:
    """A configuration for free loopback ports; `changes` are YAML fields in camelCase."""
    policy = {"endpoints": list(endpoints), "probeSeconds": 0.1, "connectTimeoutSeconds": 1}
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
