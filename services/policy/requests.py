"""From the contract's requests to the engine's, and from the engine's thread to an async stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from services.policy.engine import Engine, Event, GenerationRequest, RequestFailed, SampleFinished, SamplingParams
from steersman.errors import InvalidArgumentError
from steersman.rpc.metrics import GENERATED_TOKENS
from steersman.v1 import common_pb2


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
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        mask_top_p=message.mask_top_p if message.HasField("mask_top_p") else 1.0,
    )


_MANY = 256
"""Samples from which a request is taken apart beside the loop."""


async def _submitted(engine: Engine, request: GenerationRequest, deliver: Callable[[Event], None]) -> int:
    """The handle; a caller that goes away meanwhile leaves nothing behind."""
    if len(request.prompts) * request.n < _MANY:
        return engine.submit(request, deliver)
    submitting = asyncio.ensure_future(asyncio.to_thread(engine.submit, request, deliver))
    try:
        return await asyncio.shield(submitting)
    except asyncio.CancelledError:

        def let_go(done: asyncio.Future[int]) -> None:
            if done.exception() is None:
                engine.cancel(done.result())

        submitting.add_done_callback(let_go)
        raise


async def events_of(engine: Engine, request: GenerationRequest) -> AsyncIterator[Event]:
    """The engine's events of one request as an async stream; leaving it early cancels the request."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(event: Event) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    handle = await _submitted(engine, request, deliver)
    unfinished = len(request.prompts) * request.n
    try:
        while unfinished:
            if not queue.empty():
                await asyncio.sleep(0)  # an event a step of the loop, however many have come at once
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
