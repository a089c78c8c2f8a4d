"""Servicer of the reference: translates messages and batches callers together."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np

from services.reference.config import ReferenceConfig
from services.reference.engine import ReferenceEngine, Row
from steersman.errors import FailedPreconditionError, InvalidArgumentError
from steersman.rpc.batcher import TokenBudgetBatcher
from steersman.rpc.wire import pack_rows, unpack_rows
from steersman.v1 import reference_pb2 as pb
from steersman.v1 import reference_pb2_grpc


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    def __init__(self, engine: ReferenceEngine, config: ReferenceConfig) -> None:
        self._engine = engine
        self.batcher = TokenBudgetBatcher(
            engine.logprobs, lambda row: row.tokens, config.batch_tokens, merge=config.merge_requests
        )

    async def ComputeLogprobs(
        self, request: pb.ComputeLogprobsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ComputeLogprobsResponse:
        # Beside the loop: the checksums of the largest request take longer than others may wait.
        rows = await asyncio.to_thread(self._rows, request)
        results = await self.batcher.submit(rows)
        return pb.ComputeLogprobsResponse(logprobs=await asyncio.to_thread(pack_rows, results, np.float32))

    def _rows(self, request: pb.ComputeLogprobsRequest) -> list[Row]:
        info = self._engine.info
        if request.tokenizer_fingerprint and request.tokenizer_fingerprint != info.tokenizer_fingerprint:
            raise FailedPreconditionError("the caller's tokenizer is not the reference's; start both from one base")
        rows = unpack_rows(request.token_ids, np.int32, "token_ids")
        if len(rows) != len(request.prompt_lengths):
            raise InvalidArgumentError(
                f"prompt_lengths has {len(request.prompt_lengths)} values for {len(rows)} rows; send one a row"
            )
        temperature = request.temperature if request.HasField("temperature") else 1.0
        if not temperature > 0:
            raise InvalidArgumentError(f"temperature is {temperature}; it must be above 0")
        for index, (row, length) in enumerate(zip(rows, request.prompt_lengths, strict=True)):
            self._check(index, row, length)
        return [Row(row[:n], row[n:], temperature) for row, n in zip(rows, request.prompt_lengths, strict=True)]

    def _check(self, index: int, row: np.ndarray, prompt_length: int) -> None:
        info = self._engine.info
        if not 1 <= prompt_length <= len(row):
            raise InvalidArgumentError(f"prompt_lengths[{index}] is {prompt_length}; it must be 1 to {len(row)}")
        if len(row) > info.max_context:
            raise InvalidArgumentError(f"row {index} has {len(row)} tokens; the context holds {info.max_context}")
        if len(row) and not 0 <= row.min() <= row.max() < info.vocab_size:
            raise InvalidArgumentError(f"row {index} has a token id outside the vocabulary of {info.vocab_size}")

    async def GetReferenceInfo(
        self, request: pb.GetReferenceInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetReferenceInfoResponse:
        return pb.GetReferenceInfoResponse(model=self._engine.info)
