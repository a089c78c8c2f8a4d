"""Servicer of the data plane: translates messages to the engine's types and bridges its thread to asyncio."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import grpc
import numpy as np

from services.policy.chat import ChatFormat, answer
from services.policy.engine import Engine, Event, GenerationRequest, RequestFailed, SampleFinished, SamplingParams
from steersman.errors import FailedPreconditionError, InvalidArgumentError
from steersman.rpc.finish import finish_reason
from steersman.rpc.metrics import GENERATED_TOKENS
from steersman.rpc.wire import pack_rows, unpack_rows
from steersman.v1 import common_pb2, policy_pb2_grpc
from steersman.v1 import policy_pb2 as pb


def sampling_params(message: common_pb2.SamplingParams, top_logprobs: int = 0) -> SamplingParams:
    """Domain type of the wire message, its defaults filled in."""
    if not message.max_new_tokens:
        raise InvalidArgumentError("sampling.max_new_tokens is 0; set the token limit of an answer")
    return SamplingParams(
        max_new_tokens=message.max_new_tokens,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        min_new_tokens=message.min_new_tokens,
        top_logprobs=top_logprobs,
    )


async def events_of(engine: Engine, request: GenerationRequest) -> AsyncIterator[Event]:
    """The engine's events of one request as an async stream; leaving it early cancels the request."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(event: Event) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    handle = engine.submit(request, deliver)
    unfinished = len(request.prompts) * request.n
    try:
        while unfinished:
            event = await queue.get()
            if isinstance(event, RequestFailed):
                unfinished = 0
                raise event.error
            if isinstance(event, SampleFinished):
                unfinished -= 1
                GENERATED_TOKENS.inc(len(event.token_ids))
            yield event
    finally:
        if unfinished:
            engine.cancel(handle)


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
        generation = GenerationRequest(
            request_id=str(uuid.uuid4()),
            prompts=unpack_rows(request.prompts, np.int32, "prompts"),
            params=sampling_params(request.sampling),
            n=request.n or 1,
            first_prompt=request.first_prompt,
        )
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
