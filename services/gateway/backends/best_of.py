"""Best of n at serving: a replica that samples several answers and gives the one that the reward service likes most.

    request -> n samples of the same replica -> reward service -> the best, replayed as it was generated

It costs n times the tokens, and nothing can be streamed before all samples are there. What is already a choice of the
caller's (several choices, tools, a text to continue) or has only one answer (temperature 0) passes unchanged. Where no
sample has a reward, the first one is the answer: a broken reward service must not silence the chatbot.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator

import grpc

from services.gateway.backends.base import Replica, ReplicaInfo
from services.gateway.config import BestOf
from steersman.config.tls import ClientTls
from steersman.rpc.client import open_aio_channel
from steersman.v1 import common_pb2, reward_pb2, reward_pb2_grpc
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse

log = logging.getLogger("steersman.gateway")


class RewardJudge:
    """Scores answers on the reward services in turn."""

    def __init__(self, config: BestOf, tls: ClientTls | None) -> None:
        self._channels = [open_aio_channel(target, tls) for target in config.reward_endpoints]
        self._stubs = itertools.cycle([reward_pb2_grpc.RewardServiceStub(channel) for channel in self._channels])
        self._seconds = config.reward_seconds

    async def rewards(self, request: PolicyServiceChatRequest, answers: list[str]) -> list[float | None]:
        """One reward an answer; None where there is none, for all of them when the service cannot be reached."""
        items = [
            reward_pb2.ScoreItem(messages=[*request.messages, common_pb2.Message(role="assistant", content=text)])
            for text in answers
        ]
        try:
            response = await next(self._stubs).Score(reward_pb2.ScoreRequest(items=items), timeout=self._seconds)
        except grpc.aio.AioRpcError as error:
            log.warning("best of n: the reward service failed (%s); the first answer is given", error.details())
            return [None] * len(answers)
        return [score.reward if score.HasField("reward") else None for score in response.scores]

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


class BestOfReplica:
    """See `services.gateway.backends.base.Replica`."""

    def __init__(self, inner: Replica, n: int, judge: RewardJudge) -> None:
        self.target = inner.target
        self._inner = inner
        self._n = n
        self._judge = judge

    async def stream(
        self, request: PolicyServiceChatRequest, seconds: float
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        if (
            request.n > 1
            or request.prompt
            or request.prompt_token_ids
            or request.tools_json
            or not request.sampling.temperature
        ):
            async for response in _closing(self._inner.stream(request, seconds)):
                yield response
            return
        several = PolicyServiceChatRequest()
        several.CopyFrom(request)
        several.n = self._n
        choices: list[list[PolicyServiceChatResponse]] = [[] for _ in range(self._n)]
        async for response in _closing(self._inner.stream(several, seconds)):
            choices[response.choice_index].append(response)
        texts = ["".join(response.delta for response in choice) for choice in choices]
        # All samples were generated, so all of them are used, although one is given.
        tokens = sum(max((r.completion_tokens for r in choice), default=0) for choice in choices)
        for response in choices[best(await self._judge.rewards(request, texts), choices)]:
            response.choice_index = 0
            if response.finish_reason:
                response.completion_tokens = tokens
            yield response

    async def probe(self) -> ReplicaInfo:
        return await self._inner.probe()

    async def close(self) -> None:
        await self._inner.close()
        await self._judge.close()


def best(rewards: list[float | None], choices: list[list[PolicyServiceChatResponse]]) -> int:
    """Index of the highest reward; one that ended by itself wins over one that was cut short, the first wins a tie."""
    ended = [bool(choice) and choice[-1].finish_reason == common_pb2.FINISH_REASON_STOP for choice in choices]
    known = [index for index, reward in enumerate(rewards) if reward is not None]
    return max(known, key=lambda index: (ended[index], rewards[index]), default=0)


async def _closing(stream: AsyncIterator[PolicyServiceChatResponse]) -> AsyncGenerator[PolicyServiceChatResponse, None]:
    """The same stream, closed with the generator, so that the replica stops at once when nobody listens any more."""
    try:
        async for response in stream:
            yield response
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
