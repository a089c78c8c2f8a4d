"""Replicas of the embedding service, over gRPC."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from services.gateway.config import EmbeddingModel
from steersman.errors import UnavailableError, from_grpc
from steersman.rpc.client import open_aio_channel
from steersman.rpc.wire import unpack_rows
from steersman.v1 import embedding_pb2 as pb
from steersman.v1.embedding_pb2_grpc import EmbeddingServiceStub


@dataclass(frozen=True, slots=True)
class Embeddings:
    vectors: list[np.ndarray]
    """float32, one an input."""
    tokens: int
    """Of all inputs."""


class EmbeddingPool:
    """The replicas take turns; where one cannot be reached the next is asked, each once."""

    def __init__(self, config: EmbeddingModel) -> None:
        self._channels = [open_aio_channel(endpoint, config.tls) for endpoint in config.endpoints]
        self._stubs = [EmbeddingServiceStub(channel) for channel in self._channels]
        self._first = itertools.cycle(range(len(self._stubs)))
        self._seconds = config.seconds

    async def embed(self, inputs: Sequence[str | Sequence[int]], dimensions: int) -> Embeddings:
        """Raises SteersmanError of the class that fits the cause."""
        request = pb.EmbedRequest(dimensions=dimensions)
        for each in inputs:
            if isinstance(each, str):
                request.inputs.add(text=each)
            else:
                request.inputs.add(tokens=pb.EmbedTokens(token_ids=each))
        first = next(self._first)
        for attempt in range(len(self._stubs)):
            stub = self._stubs[(first + attempt) % len(self._stubs)]
            try:
                response = await stub.Embed(request, timeout=self._seconds)
            except grpc.aio.AioRpcError as error:
                translated = from_grpc(error, "embedding service")
                if not isinstance(translated, UnavailableError) or attempt == len(self._stubs) - 1:
                    raise translated from None
            else:
                return Embeddings(unpack_rows(response.vectors, np.float32, "vectors"), sum(response.lengths))
        raise AssertionError("there is at least one replica")

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()
