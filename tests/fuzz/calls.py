"""Every gRPC method of the real servers, around a tiny model, with bytes, damaged messages and drawn structures.

A server may refuse what it documents. INTERNAL and UNKNOWN are defects, and so is no answer within PATIENCE seconds.
"""

from __future__ import annotations

import atexit
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message
from hypothesis import strategies as st

from fuzz import values

PATIENCE = 30.0
_DEFECTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED)
_INTEGERS = [0, 1, 2, 3, 7, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1, -1, -(2**31), -(2**63)]
_REALS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, float("inf"), float("-inf"), float("nan")]
_LIMITS = {
    Field.TYPE_INT32: (-(2**31), 2**31 - 1),
    Field.TYPE_INT64: (-(2**63), 2**63 - 1),
    Field.TYPE_UINT32: (0, 2**32 - 1),
    Field.TYPE_FIXED32: (0, 2**32 - 1),
    Field.TYPE_UINT64: (0, 2**64 - 1),
}


@dataclass(frozen=True)
class Method:
    server: str
    path: str
    request: type[Message]
    streams: bool
    """Takes a stream of requests."""


@cache
def methods() -> list[Method]:
    from google.protobuf.message_factory import GetMessageClass

    from steersman.v1 import chat_pb2, embedding_pb2, policy_pb2, reference_pb2, reward_pb2, weights_pb2

    files = {"gateway": chat_pb2, "embedding": embedding_pb2, "policy": policy_pb2, "reference": reference_pb2,
             "reward": reward_pb2, "weights": weights_pb2}  # fmt: skip
    return [
        Method(
            server, f"/{service.full_name}/{method.name}", GetMessageClass(method.input_type), method.client_streaming
        )
        for server, file in files.items()
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


# -- what is sent ------------------------------------------------------------------------------------------------------


def requests() -> st.SearchStrategy[tuple[Method, list[bytes]]]:
    return st.sampled_from(methods()).flatmap(
        lambda method: st.tuples(
            st.just(method), st.lists(_one(method), min_size=1, max_size=3 if method.streams else 1)
        )
    )


def _one(method: Method) -> st.SearchStrategy[bytes]:
    good = [message.SerializeToString() for message in _good() if isinstance(message, method.request)] or [b""]
    drawn = _filled(method.request.DESCRIPTOR, 3).map(lambda message: message.SerializeToString())
    return st.one_of(st.binary(max_size=64), values.strategy(values.flipped(good)), drawn, drawn)


@cache
def _good() -> list[Message]:
    """Requests that are answered, for damaged copies of them."""
    from steersman.rpc.wire import pack_rows
    from steersman.v1 import chat_pb2, common_pb2, embedding_pb2, policy_pb2, reference_pb2, reward_pb2, weights_pb2

    rows = pack_rows([np.array([5, 6, 7], np.int32)], np.int32)
    said = [common_pb2.Message(role="user", content="Where is order 7?")]
    sampling = common_pb2.SamplingParams(max_new_tokens=4)
    manifest = weights_pb2.WeightsManifest(kind=weights_pb2.WEIGHTS_KIND_FULL, size=64, digest="0" * 64)
    return [
        chat_pb2.ChatRequest(messages=said, sampling=sampling),
        chat_pb2.SubmitFeedbackRequest(event_id="e", answer_id="a", thumbs_up=True),
        chat_pb2.ConfirmActionRequest(id="a"),
        embedding_pb2.EmbedRequest(inputs=[embedding_pb2.EmbedInput(text="a")]),
        policy_pb2.GenerateRequest(prompts=rows, n=2, sampling=sampling),
        policy_pb2.PolicyServiceChatRequest(messages=said, sampling=sampling),
        reference_pb2.ComputeLogprobsRequest(token_ids=rows, prompt_lengths=[1]),
        reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(token_ids=rows)]),
        weights_pb2.BeginUpdateRequest(version=1, manifest=manifest),
        weights_pb2.UploadChunksRequest(version=1, data=b"x" * 16),
    ]


@st.composite
def _filled(draw: st.DrawFn, descriptor: Any, depth: int) -> Message:
    """A message with some of its fields set to something odd."""
    from google.protobuf.message_factory import GetMessageClass

    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.message_type is not None:
            if depth:
                inner = [draw(_filled(field.message_type, depth - 1)) for _ in range(draw(st.integers(1, 2)))]
                getattr(message, field.name).extend(inner) if field.is_repeated else getattr(
                    message, field.name
                ).CopyFrom(inner[0])
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_scalar(field), max_size=3)))
        else:
            setattr(message, field.name, draw(_scalar(field)))
    return message


def _scalar(field: Any) -> st.SearchStrategy[Any]:
    if field.type == Field.TYPE_STRING:
        return values.strategy(lambda draw: values.texts(draw).encode("utf-8", "replace").decode())
    if field.type == Field.TYPE_BYTES:
        return st.binary(max_size=32)
    if field.type == Field.TYPE_BOOL:
        return st.booleans()
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return st.sampled_from(_REALS)
    if field.type == Field.TYPE_ENUM:
        return st.sampled_from([value.number for value in field.enum_type.values] + [99])
    low, high = _LIMITS.get(field.type, (0, 2**31 - 1))
    return st.sampled_from([value for value in _INTEGERS if low <= value <= high])


# -- the servers -------------------------------------------------------------------------------------------------------


@cache
def _channels() -> dict[str, grpc.Channel]:
    from live_services import Cluster, LoopThread

    from services.embedding.config import EmbeddingOptions
    from services.embedding.servicer import EmbeddingServicer
    from services.gateway.server import Gateway
    from services.gateway.testing import gateway_config
    from steersman.rpc.server import Server, ServerConfig
    from steersman.testing.models import save_model_folder, tiny_llama, tiny_tokenizer
    from steersman.v1.embedding_pb2_grpc import add_EmbeddingServiceServicer_to_server

    folder = tempfile.TemporaryDirectory(prefix="fuzz-")
    atexit.register(folder.cleanup)
    model = save_model_folder(Path(folder.name) / "model", tiny_llama(), tiny_tokenizer())
    cluster = Cluster(LoopThread())
    cluster.start_policy(model)
    cluster.start_reward([{"name": "regex", "kind": "verifiable", "options": {"pattern": "yes"}}])
    cluster.start_reference(model)
    servicer = EmbeddingServicer(lambda: model, EmbeddingOptions(), "cpu")

    async def start() -> tuple[int, int]:
        listed = [(0, [(add_EmbeddingServiceServicer_to_server, servicer, "steersman.v1.EmbeddingService")])]
        server = Server(ServerConfig(drain_seconds=0), listed)
        await server.start()
        servicer.load()
        await server.ready()
        database = f"sqlite:///{folder.name}/gateway.db"
        gateway = Gateway(gateway_config(cluster.endpoints["policy"][0], database=database))
        await gateway.start()
        _kept.extend([server, gateway])
        return server.ports[0], gateway.grpc_port

    embedding, gateway = cluster.loop.run(start())
    _kept.append(cluster)
    targets = {name: one[0] for name, one in cluster.endpoints.items()}
    targets |= {"embedding": f"127.0.0.1:{embedding}", "gateway": f"127.0.0.1:{gateway}"}
    return {name: grpc.insecure_channel(target) for name, target in targets.items()}


_kept: list[Any] = []
"""Servers that must not be collected while they serve."""


def call(case: tuple[Method, list[bytes]]) -> None:
    method, messages = case
    channel, code, words = _channels()[method.server], grpc.StatusCode.OK, ""
    try:
        if method.streams:
            channel.stream_unary(method.path)(iter(messages), timeout=PATIENCE)
        else:
            for _ in channel.unary_stream(method.path)(messages[0], timeout=PATIENCE):
                pass
    except grpc.RpcError as error:
        code, words = error.code(), error.details() or ""
    assert code not in _DEFECTS, f"{method.path}: {code.name} {words}"
    assert "Traceback" not in words
