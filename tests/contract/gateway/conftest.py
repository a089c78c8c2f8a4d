"""A gateway on loopback before a fake policy service, all on real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest

from services.gateway.server import Gateway
from services.gateway.testing import gateway_config, running_gateway
from steersman.testing.fake_policy import FakePolicy, serve_policy


@pytest.fixture
def policy() -> FakePolicy:
    return FakePolicy()


@pytest.fixture
async def gateway(policy: FakePolicy) -> AsyncIterator[Gateway]:
    async with serve_policy(policy) as endpoint, running_gateway(gateway_config(endpoint)) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client
