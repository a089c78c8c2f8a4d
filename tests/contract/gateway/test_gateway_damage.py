"""A bit that flips on the way to the engine changes no answer, is no fault of the caller's and does not last."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import grpc
import pytest

from services.gateway.backends.policy import PolicyReplica
from services.gateway.backends.pool import ReplicaPool
from steersman.errors import ChecksumError, DeadlineError, InvalidArgumentError, UnavailableError
from steersman.rpc.sealed import CHECKSUM, Arrived, Unreadable, checked, checksum_of, sealed
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest

SAID = "hello there, what is the price of order 2, and when does it come?"
REQUEST = PolicyServiceChatRequest(messages=[common_pb2.Message(role="user", content=SAID)])


def test_no_flipped_bit_of_a_sealed_request_is_read_as_another() -> None:
    read = checked("Chat", PolicyServiceChatRequest.FromString)
    data = sealed(REQUEST)
    assert read(data) == Arrived(REQUEST, len(data), checksum_of(data))
    plain = REQUEST.SerializeToString()
    assert read(plain) == Arrived(REQUEST, len(plain), None), "of a client that seals nothing"
    assert PolicyServiceChatRequest.FromString(data).messages == REQUEST.messages, "a server that knows no seals"
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        found = read(bytes(changed))
        if isinstance(found, Unreadable):
            assert isinstance(found.error, (ChecksumError, InvalidArgumentError))
        else:
            assert found.checksum is None
            assert found.request.messages == REQUEST.messages, "only the seal was damaged"


async def test_a_call_takes_no_other_calls_message() -> None:
    """A bit of a frame's head is enough to bring a whole message, or an empty one, to another call."""
    mine = (CHECKSUM, checksum_of(sealed(REQUEST)))
    other = sealed(PolicyServiceChatRequest(messages=[common_pb2.Message(role="user", content="what do I owe?")]))
    async with serve_policy(FakePolicy()) as engine, grpc.aio.insecure_channel(engine) as channel:
        chat = channel.unary_stream("/steersman.v1.PolicyService/Chat")
        assert [part async for part in chat(sealed(REQUEST), metadata=(mine,))]
        assert [part async for part in chat(REQUEST.SerializeToString())], "of a client that seals nothing"
        for data in (b"", other, REQUEST.SerializeToString(), b"\xff" + sealed(REQUEST)[1:]):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                [part async for part in chat(data, metadata=(mine,))]
            assert error.value.code() == grpc.StatusCode.DATA_LOSS


class Flipping:
    """Forwards to a port; a bit of one byte of what the first connection sends is flipped."""

    def __init__(self, target: str, place: int) -> None:
        self._target = int(target.rpartition(":")[2])
        self._left: int | None = place
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
        for work in (self._move(reader, there_writer, asked=True), self._move(there_reader, writer, asked=False)):
            self._tasks.add(asyncio.create_task(work))

    async def _move(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asked: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if asked and self._left is not None:
                    if self._left < len(data):
                        changed = bytearray(data)
                        changed[self._left] ^= 0x10
                        data, self._left = bytes(changed), None
                    else:
                        self._left -= len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


@pytest.mark.parametrize("first", [0, 1, 2, 3])
async def test_a_flipped_bit_on_the_way_to_the_engine_changes_no_answer_and_does_not_last(first: int) -> None:
    policy = FakePolicy()
    outcomes: Counter[str] = Counter()

    async def one(engine: str, place: int) -> None:
        async with Flipping(engine, place) as target:
            pool = ReplicaPool([PolicyReplica(target, None, 1.0)], 1.0)
            try:
                text = ""
                async for response in pool.stream(REQUEST, 3.0):
                    text += response.delta
                assert text == f"You said: {SAID}", place
                outcomes["answered"] += 1
            except (UnavailableError, DeadlineError) as error:
                outcomes[type(error).__name__] += 1
            (replica,) = (member.replica for member in pool._members)
            for tries in range(30):
                with contextlib.suppress(UnavailableError):
                    await replica.probe()
                    break
                assert tries < 29, f"{place}: no probe is answered any more"
            await pool.close()

    async with serve_policy(policy) as engine:
        for place in range(24 + first, 640, 40):
            await one(engine, place)
    assert outcomes["answered"] >= 6, outcomes
    assert {request.messages[0].content for request in policy.requests} == {SAID}
