"""Every field of every request has a bound in the contract, and every server holds to it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from steersman.errors import InvalidArgumentError
from steersman.rpc import bounds
from steersman.rpc.bounds import bound_of, check
from steersman.rpc.client import open_aio_channel
from steersman.rpc.server import Server, ServerConfig
from steersman.v1 import (
    chat_pb2,
    common_pb2,
    embedding_pb2,
    policy_pb2,
    reference_pb2,
    reward_pb2,
    reward_pb2_grpc,
    weights_pb2,
)

FILES = (chat_pb2, embedding_pb2, policy_pb2, reference_pb2, reward_pb2, weights_pb2)
TEXT, FRACTIONS = FieldDescriptor.TYPE_STRING, (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE)


def of_requests() -> Iterator[FieldDescriptor]:
    """Every field that a request may have, those of the messages in it included."""
    left: list[Descriptor] = [
        method.input_type
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    assert len(left) >= 16
    seen = set()
    while left:
        descriptor = left.pop()
        if descriptor.full_name in seen:
            continue
        seen.add(descriptor.full_name)
        for field in descriptor.fields:
            yield field
            if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                left.append(field.message_type)


def test_every_field_of_every_request_has_its_bound_in_the_contract() -> None:
    """Bytes have that of the message, whole numbers that of their type."""
    without = []
    for field in of_requests():
        bound, value = bound_of(field), field
        if field.is_repeated and not bound.entries:
            without.append(field.full_name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
        if value.type == TEXT and not bound.characters:
            without.append(field.full_name)
        if value.type in FRACTIONS and not (bound.HasField("least") and bound.HasField("most")):
            without.append(field.full_name)
    assert without == []


def chat(**fields: object) -> Message:
    return policy_pb2.PolicyServiceChatRequest(**fields)


def sampling(**fields: object) -> Message:
    return policy_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(**fields))  # type: ignore[arg-type]


CALL = common_pb2.Message(role="assistant", tool_calls=[common_pb2.ToolCall(name="a" * 1025)])


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (chat(stop=["a"] * 17), "stop has 17 entries; it holds at most 16"),
        (chat(stop=["a", "a" * 513]), r"stop\[1\] has 513 characters; it holds at most 512"),
        (chat(top_logprobs=101), "top_logprobs is 101; it must be at most 100"),
        (chat(messages=[common_pb2.Message(role="user"), CALL]), r"messages\[1\].tool_calls\[0\].name has 1025"),
        (chat(prompt="a" * (2**23 + 1)), "prompt has 8388609 characters"),
        (sampling(temperature=math.nan), "sampling.temperature is nan; it must be at least 0 and at most 100"),
        (sampling(temperature=math.inf), "sampling.temperature is inf"),
        (sampling(top_p=-0.5), "sampling.top_p is -0.5; it must be at least 0 and at most 1"),
        (sampling(logit_bias={7: math.nan}), r"sampling.logit_bias\[7\] is nan"),
        (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "sampling.logit_bias has 1025 entries"),
        (reward_pb2.ScoreRequest(progress=reward_pb2.TrainingProgress(step=-1)), "progress.step is -1; .* at least 0"),
        (reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem()] * 16_385), "items has 16385 entries"),
        (chat_pb2.SubmitFeedbackRequest(edited_answer="a" * 100_001), "edited_answer has 100001 characters"),
        (
            weights_pb2.BeginUpdateRequest(manifest=weights_pb2.WeightsManifest(artifact_url="a" * 4097)),
            "manifest.artifact_url has 4097 characters",
        ),
    ],
)
def test_what_is_beyond_its_bound_is_refused_by_name(request_: Message, sentence: str) -> None:
    with pytest.raises(InvalidArgumentError, match=sentence):
        check(request_)


def test_what_is_within_its_bounds_or_absent_is_taken() -> None:
    check(chat(stop=["é" * 512] * 16, top_logprobs=100, n=1))
    check(sampling(temperature=0.0, top_p=1.0, logit_bias={1: -100.0}))
    check(embedding_pb2.EmbedRequest(inputs=[embedding_pb2.EmbedInput(text="a")] * 2048))
    check(chat_pb2.SubmitFeedbackRequest(thumbs_up=True))
    check(weights_pb2.UploadChunksRequest(data=b"a" * 2**20))


class Scores(reward_pb2_grpc.RewardServiceServicer):
    async def Score(self, request: reward_pb2.ScoreRequest, context: object) -> reward_pb2.ScoreResponse:
        return reward_pb2.ScoreResponse(scores=[reward_pb2.ItemScore(reward=1.0)] * len(request.items))


@pytest.mark.parametrize("items", [1, 1000], ids=["on the loop", "beside it"])
async def test_every_server_checks_before_its_service_is_asked(items: int) -> None:
    add = reward_pb2_grpc.add_RewardServiceServicer_to_server
    server = Server(ServerConfig(drain_seconds=0), [(0, [(add, Scores(), "steersman.v1.RewardService")])])
    await server.start()
    async with open_aio_channel(f"127.0.0.1:{server.ports[0]}") as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        item = reward_pb2.ScoreItem(messages=[common_pb2.Message(role="assistant", content="a" * 20)])
        request = reward_pb2.ScoreRequest(items=[item] * items)
        assert (request.ByteSize() > bounds._AT_ONCE_BYTES) == (items > 1)
        assert len((await stub.Score(request)).scores) == items
        request.items[-1].messages[0].role = "a" * 17
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Score(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == f"items[{items - 1}].messages[0].role has 17 characters; it holds at most 16"
    await server.drain()
