"""The largest requests of every model service keep no other caller waiting: no step of the event loop computes long.

Measured is the processor time of the loop's thread between two of its turns, which a busy machine hardly stretches.
grpc.aio reads messages there, and no server can move that: hence the bound of a message, and callers that ask in parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from services.policy.chat import ChatFormat
from services.policy.engine import EngineInfo, Event, GenerationRequest, SampleFinished, TokenEvent
from services.policy.servicer import PolicyServicer
from services.reference.servicer import ReferenceServicer
from services.reward.servicer import RewardServicer
from steersman.errors import InvalidArgumentError
from steersman.rpc.server import ANSWER_BYTES, Server, ServerConfig, channel_options
from steersman.rpc.wire import REQUEST_BYTES, REQUEST_ITEMS, in_parts, pack_rows
from steersman.testing.models import tiny_tokenizer
from steersman.v1 import (
    common_pb2,
    policy_pb2,
    policy_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)
from training.online.clients import ReferenceClient
from training.online.remote import calls

SECONDS = 0.02
ROOM = REQUEST_BYTES - 2**20


class Steps:
    """The longest step that the loop's thread has computed."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest, last = max(self.longest, now - last), now


def unit() -> float:
    """How many times slower than a machine of today this one is, at least 1."""
    begin = time.thread_time()
    sum(number & 3 for number in range(100_000))
    return max(1.0, (time.thread_time() - begin) / 0.008)


INFO = EngineInfo("fake", "m", 300, 2**26, (2,), "float32", "cpu", 1, 0, 0)


class Sampler:
    """An engine whose samples are there at once."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def info(self) -> EngineInfo:
        return INFO

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        threading.Thread(target=self._work, args=(request, on_event)).start()
        return 0

    def _work(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        for number, event in enumerate(self._events(request)):
            on_event(event)
            if number % 256 == 255:  # what one step of an engine may end
                time.sleep(0.001)

    def _events(self, request: GenerationRequest) -> Iterator[Event]:
        ids, logprobs = np.full(self.tokens, 70, np.int32), np.zeros(self.tokens, np.float32)
        top = tuple((71, -1.0) for _ in range(request.params.top_logprobs))
        for prompt in range(len(request.prompts)):
            for sample in range(request.n):
                for _ in range(self.tokens if request.stream else 0):
                    yield TokenEvent(prompt, sample, 70, 0.0, 1, top)
                yield SampleFinished(prompt, sample, ids, logprobs, "length", (1,))

    def cancel(self, handle: int) -> None: ...


def policy(tokens: int) -> tuple[Any, Any, str]:
    servicer = PolicyServicer(Sampler(tokens), ChatFormat(tiny_tokenizer(), ""))
    return policy_pb2_grpc.add_PolicyServiceServicer_to_server, servicer, "steersman.v1.PolicyService"


def reward() -> tuple[Any, Any, str]:
    score = lambda items: [reward_pb2.ItemScore(reward=1.0) for _ in items]  # noqa: E731
    engine, config = SimpleNamespace(score=score), SimpleNamespace(batch_tokens=65_536, merge_requests=True)
    servicer = RewardServicer(engine, config)  # type: ignore[arg-type]
    return reward_pb2_grpc.add_RewardServiceServicer_to_server, servicer, "steersman.v1.RewardService"


def reference() -> tuple[Any, Any, str]:
    logprobs = lambda rows: [np.zeros(len(row.response), np.float32) for row in rows]  # noqa: E731
    engine = SimpleNamespace(logprobs=logprobs, info=common_pb2.ModelInfo(name="m", vocab_size=300, max_context=2**26))
    config = SimpleNamespace(batch_tokens=65_536, merge_requests=True)
    servicer = ReferenceServicer(engine, config)  # type: ignore[arg-type]
    return reference_pb2_grpc.add_ReferenceServiceServicer_to_server, servicer, "steersman.v1.ReferenceService"


ROW = [np.full(ROOM // REQUEST_ITEMS // 4 - 8, 70, np.int32)]
TEXT = common_pb2.Message(role="assistant", content="a" * (ROOM // REQUEST_ITEMS - 32))
SAMPLING = common_pb2.SamplingParams(max_new_tokens=1)
CASES: dict[str, tuple[Callable[[], tuple[Any, Any, str]], str, Callable[[], Message]]] = {
    "samples": (
        lambda: policy(4),
        "Generate",
        lambda: policy_pb2.GenerateRequest(prompts=pack_rows(ROW * REQUEST_ITEMS), sampling=SAMPLING),
    ),
    "a chat": (
        lambda: policy(4),
        "Chat",
        lambda: policy_pb2.PolicyServiceChatRequest(
            messages=[common_pb2.Message(role="user", content="a" * 2**20)], sampling=SAMPLING, whole=True
        ),
    ),
    "a long answer at once": (
        lambda: policy(4_000),
        "Chat",
        lambda: policy_pb2.PolicyServiceChatRequest(prompt="a", sampling=SAMPLING, whole=True, top_logprobs=20),
    ),
    "scores of tokens": (
        reward,
        "Score",
        lambda: reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(token_ids=pack_rows(ROW))] * REQUEST_ITEMS),
    ),
    "scores of texts": (
        reward,
        "Score",
        lambda: reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(messages=[TEXT])] * REQUEST_ITEMS),
    ),
    "log-probabilities": (
        reference,
        "ComputeLogprobs",
        lambda: reference_pb2.ComputeLogprobsRequest(
            token_ids=pack_rows(ROW * REQUEST_ITEMS), prompt_lengths=[1] * REQUEST_ITEMS
        ),
    ),
}


@contextlib.asynccontextmanager
async def served(service: tuple[Any, Any, str]) -> AsyncIterator[str]:
    register, servicer, name = service
    server = Server(ServerConfig(drain_seconds=0), [(0, [(register, servicer, name)])])
    await server.start()
    await server.ready()
    try:
        yield f"127.0.0.1:{server.ports[0]}"
    finally:
        if (batcher := getattr(servicer, "batcher", None)) is not None:
            await batcher.close()
        await server.drain()


@pytest.mark.parametrize("case", CASES)
async def test_no_step_of_the_loop_computes_long(case: str) -> None:
    make_service, method, make = CASES[case]
    service, data = make_service(), make().SerializeToString()

    def call(target: str) -> int:
        with grpc.insecure_channel(target, channel_options(ANSWER_BYTES)) as channel:
            path = f"/{service[2]}/{method}"
            if method in ("Generate", "Chat"):
                return sum(1 for _ in channel.unary_stream(path)(data, timeout=300))
            channel.unary_unary(path)(data, timeout=300)
            return 1

    async def longest_step() -> float:
        steps = Steps()
        watching = asyncio.create_task(steps.watch())
        try:
            assert await asyncio.to_thread(call, target) > 0
        finally:
            watching.cancel()
        return steps.longest

    async with served(service) as target:
        found: list[float] = []
        while len(found) < 3 and (not found or min(found) >= SECONDS * unit()):
            found.append(await longest_step())  # what is long by construction is so every time
    assert min(found) < SECONDS * unit(), found


async def test_what_is_more_than_a_request_holds_is_asked_in_parts() -> None:
    """Three rows of 3 MiB each, and one that no request holds."""
    rows = [(np.full(700_000 + number, 70, np.int32), np.full(100_000, 71, np.int32)) for number in range(3)]
    assert [(part.start, part.stop) for part in in_parts([4 * 800_000] * 3)] == [(0, 2), (2, 3)]

    def ask(target: str) -> list[np.ndarray]:
        client = ReferenceClient(target, "", 60, print)
        try:
            return calls().run(client.logprobs(rows, 1.0))
        finally:
            client.close()

    async with served(reference()) as target:
        assert [len(row) for row in await asyncio.to_thread(ask, target)] == [100_000] * 3


def test_parts_are_neighbours_within_bytes_and_items() -> None:
    def bounds(sizes: list[int], most: int) -> list[tuple[int, int]]:
        return [(part.start, part.stop) for part in in_parts(sizes, most)]

    assert bounds([], 100) == []
    assert bounds([18, 18, 18], 100) == [(0, 2), (2, 3)], "each takes 32 bytes more"
    assert bounds([0, 500, 0], 100) == [(0, 1), (1, 2), (2, 3)], "what is too large goes alone"
    assert bounds([0] * (REQUEST_ITEMS + 1), 2**40) == [(0, REQUEST_ITEMS), (REQUEST_ITEMS, REQUEST_ITEMS + 1)]


async def test_more_items_than_a_request_holds_are_refused_in_words() -> None:
    _, servicer, _ = reward()
    items = [reward_pb2.ScoreItem(messages=[common_pb2.Message(role="assistant", content="a")])]
    with pytest.raises(InvalidArgumentError, match="16385 items are too many; a request holds at most 16384"):
        await servicer.Score(reward_pb2.ScoreRequest(items=items * (REQUEST_ITEMS + 1)), None)
