"""Best of n at serving: a fake policy that samples, and a real reward service that prefers one of the samples."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from services.gateway.backends.best_of import best
from services.gateway.testing import gateway_config, running_gateway
from services.reward.config import RewardConfig
from steersman.config.base import load_model
from steersman.rpc.server import Server
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import common_pb2, reward_pb2_grpc
from steersman.v1.policy_pb2 import PolicyServiceChatResponse

HELLO = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def serve_reward(pattern: str) -> AsyncIterator[str]:
    """A reward service whose only scorer is a regular expression."""
    from services.reward.engine import RewardEngine
    from services.reward.servicer import RewardServicer

    scorer = {"name": "regex", "kind": "verifiable", "options": {"pattern": pattern}}
    config = load_model(RewardConfig, {"port": 0, "drainSeconds": 0, "scorers": [scorer]}, "test")
    engine = RewardEngine(config)
    engine.load()
    servicer = RewardServicer(engine, config)
    register = reward_pb2_grpc.add_RewardServiceServicer_to_server
    server = Server(
        config, [(0, [(register, servicer, "steersman.v1.RewardService")])], on_drain=servicer.batcher.close
    )
    await server.start()
    await server.ready()
    try:
        yield f"127.0.0.1:{server.ports[0]}"
    finally:
        await server.drain()


@asynccontextmanager
async def asking(policy: FakePolicy, reward: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with serve_policy(policy) as endpoint:
        config = gateway_config(endpoint, policy={"bestOf": {"n": 3, "rewardEndpoints": [reward], "rewardSeconds": 60}})
        async with (
            running_gateway(config) as gateway,
            openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
        ):
            yield client


async def test_the_best_sample_is_the_answer(policy: FakePolicy) -> None:
    async with serve_reward(r"\(2\)") as reward, asking(policy, reward) as client:
        answer = await client.chat.completions.create(model="steersman", messages=HELLO)
        assert [choice.message.content for choice in answer.choices] == ["You said: hello (2)"]
        assert answer.choices[0].index == 0
        assert policy.requests[-1].n == 3
        stream = await client.chat.completions.create(model="steersman", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "You said: hello (2)"
        assert {chunk.choices[0].index for chunk in chunks} == {0}


@pytest.mark.parametrize(
    "own", [{"n": 2}, {"temperature": 0}, {"tools": [{"type": "function", "function": {"name": "look"}}]}]
)
async def test_what_is_no_free_choice_passes_unchanged(own: dict[str, Any], policy: FakePolicy) -> None:
    async with serve_reward(r"\(2\)") as reward, asking(policy, reward) as client:
        answer = await client.chat.completions.create(model="steersman", messages=HELLO, **own)
        assert answer.choices[0].message.content == "You said: hello"
        assert policy.requests[-1].n == own.get("n", 1)


async def test_without_a_reward_the_first_sample_is_the_answer(policy: FakePolicy) -> None:
    async with asking(policy, "127.0.0.1:9") as client:
        answer = await client.chat.completions.create(model="steersman", messages=HELLO)
        assert answer.choices[0].message.content == "You said: hello"


@pytest.mark.parametrize(
    ("rewards", "ended", "expected"),
    [
        ([0.1, 0.9, 0.5], [True, True, True], 1),
        ([0.1, 0.9, 0.5], [True, False, True], 2),
        ([None, None, -3.0], [True, True, False], 2),
        ([0.5, 0.5, 0.1], [True, True, True], 0),
        ([None, None, None], [True, True, True], 0),
    ],
)
def test_choice(rewards: Sequence[float | None], ended: Sequence[bool], expected: int) -> None:
    reasons = [common_pb2.FINISH_REASON_STOP if end else common_pb2.FINISH_REASON_LENGTH for end in ended]
    choices = [[PolicyServiceChatResponse(finish_reason=reason)] for reason in reasons]
    assert best(list(rewards), choices) == expected
