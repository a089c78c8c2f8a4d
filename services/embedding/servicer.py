"""Servicer of embeddings: translates messages and batches callers together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from services.embedding.config import EmbeddingOptions
from steersman.errors import InvalidArgumentError, UnavailableError
from steersman.nn.embed import Embedder
from steersman.rpc.batcher import TokenBudgetBatcher
from steersman.rpc.wire import pack_rows
from steersman.v1 import embedding_pb2 as pb
from steersman.v1 import embedding_pb2_grpc


class EmbeddingServicer(embedding_pb2_grpc.EmbeddingServiceServicer):
    """`load` before it is asked; `close` at the end."""

    def __init__(self, folder: Callable[[], Path], options: EmbeddingOptions, device: str) -> None:
        self._folder = folder
        self._options = options
        self._device = device
        self._embedder: Embedder | None = None
        self._batcher = TokenBudgetBatcher(self._vectors, len, options.batch_tokens)

    def load(self) -> None:
        """Loads the model; takes long."""
        import torch

        device = self._device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        options = self._options
        self._embedder = Embedder(
            self._folder(),
            pooling=options.pooling,
            normalize=options.normalize,
            precision=options.precision,
            device=device,
            batch_tokens=options.batch_tokens,
        )

    async def close(self) -> None:
        await self._batcher.close()

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
        embedder = self._embedder
        if embedder is None:
            raise UnavailableError("the model is still being loaded; try again")
        if not request.inputs:
            raise InvalidArgumentError("inputs is empty; send at least one")
        # Beside the loop: the texts of the largest request take longer than others may wait.
        rows = await asyncio.to_thread(_rows, embedder, request)
        vectors = np.stack(await self._batcher.submit(rows))
        packed = pack_rows(list(embedder.cut(vectors, request.dimensions)), np.float32)
        return pb.EmbedResponse(vectors=packed, lengths=map(len, rows))

    def _vectors(self, rows: list[list[int]]) -> list[Any]:
        assert self._embedder is not None
        return list(self._embedder.vectors(rows))


def _rows(embedder: Embedder, request: pb.EmbedRequest) -> list[list[int]]:
    return [
        embedder.ids(index, one.text if one.WhichOneof("input") == "text" else one.tokens.token_ids)
        for index, one in enumerate(request.inputs)
    ]
