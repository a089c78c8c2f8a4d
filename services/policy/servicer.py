"""Servicer of the data plane: translates messages to the engine's types and bridges its thread to asyncio."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import grpc
import numpy as np

from services.policy.chat import ChatFormat, answer
from services.policy.engine import Engine, GenerationRequest, SampleFinished
from services.policy.requests import events_of, sampling_params
from steersman.errors import FailedPreconditionError
from steersman.rpc.finish import finish_reason
from steersman.rpc.wire import pack_rows, unpack_rows
from steersman.v1 import common_pb2, policy_pb2_grpc
from steersman.v1 import policy_pb2 as pb


def _generation(request: pb.GenerateRequest) -> GenerationRequest:
    return GenerationRequest(
        request_id=str(uuid.uuid4()),
        prompts=unpack_rows(request.prompts, np.int32, "prompts"),
        params=sampling_params(request.sampling),
        n=request.n or 1,
        first_prompt=request.first_prompt,
    )


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    def __init__(self, engine: Engine, chat: ChatFormat) -> None:
        self._engine = engine
        self._chat = chat

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        self._chat.check_fingerprint(request.tokenizer_fingerprint)
        loaded = self._engine.info().weights_version
        if request.HasField("weights_version") and request.weights_version != loaded:
            raise FailedPreconditionError(
                f"weights version {request.weights_version} is asked for, {loaded} is loaded; publish them again",
                details={"loaded_version": loaded},
            )
        # Beside the loop: the checksum of the largest request takes longer than others may wait.
        generation = await asyncio.to_thread(_generation, request)
        async for event in events_of(self._engine, generation):
            if isinstance(event, SampleFinished):
                yield pb.GenerateResponse(
                    prompt_index=event.prompt_index,
                    sample_index=event.sample_index,
                    token_ids=pack_rows([event.token_ids], np.int32),
                    logprobs=pack_rows([event.logprobs], np.float32),
                    finish_reason=finish_reason(event.finish_reason),
                    weights_versions=event.weights_versions,
                )

    async def Chat(
        self, request: pb.PolicyServiceChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PolicyServiceChatResponse]:
        async for response in answer(self._engine, self._chat, request):
            yield response

    async def GetPolicyInfo(
        self, request: pb.GetPolicyInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetPolicyInfoResponse:
        info = self._engine.info()
        return pb.GetPolicyInfoResponse(
            model=common_pb2.ModelInfo(
                name=info.model,
                tokenizer_fingerprint=self._chat.fingerprint,
                vocab_size=info.vocab_size,
                max_context=info.max_context,
                dtype=info.dtype,
                device=info.device,
            ),
            weights_version=info.weights_version,
            engine=info.engine,
            logprobs_note=info.logprobs_note,
            running=info.running,
            waiting=info.waiting,
        )
