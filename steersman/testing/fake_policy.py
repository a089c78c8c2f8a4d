"""A policy service without a model: a real gRPC server that answers with scripted text.

For tests and benchmarks of whatever stands on `PolicyService.Chat`. One word is one token; its id is the
CRC-32 of its bytes, its log-probability a fixed function of the id.
"""

from __future__ import annotations

import asyncio
import math
import re
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from steersman.rpc.conversation import append_response
from steersman.rpc.server import Server, ServerConfig
from steersman.v1 import common_pb2, policy_pb2, policy_pb2_grpc

SERVICE_NAME = "steersman.v1.PolicyService"
Reply = str | Sequence[common_pb2.ToolCall]


def echo_reply(request: policy_pb2.PolicyServiceChatRequest) -> Reply:
    """Repeats the last user message (or the prompt of a completion)."""
    if request.prompt or request.prompt_token_ids:
        return f" echo {request.prompt or _text_of(request)}"
    said = next((m.content for m in reversed(request.messages) if m.role == "user"), "")
    return f"You said: {said}"


@dataclass(eq=False)
class FakePolicy(policy_pb2_grpc.PolicyServiceServicer):
    """Streams `reply(request)` word by word.

    Counters and requests are kept for assertions.
    """

    reply: Callable[[policy_pb2.PolicyServiceChatRequest], Reply] = echo_reply
    name: str = "fake"
    thoughts: str = ""
    """What every choice thinks before it answers; one token."""
    seconds_per_token: float = 0.0
    capacity: int | None = None
    """Calls beyond this many at once are refused with RESOURCE_EXHAUSTED; None: no limit."""
    fail_with: grpc.StatusCode | None = None
    """Every call fails with this status before its first token."""
    fail_after_tokens: int | None = None
    """Every call fails with UNAVAILABLE after this many tokens."""
    weights_version: int = 1
    requests: list[policy_pb2.PolicyServiceChatRequest] = field(default_factory=list)
    keep_requests: bool = True
    running: int = 0
    peak: int = 0
    finished: int = 0
    cancelled: int = 0
    tokens_sent: int = 0

    async def GetPolicyInfo(
        self, request: policy_pb2.GetPolicyInfoRequest, context: Any
    ) -> policy_pb2.GetPolicyInfoResponse:
        model = common_pb2.ModelInfo(name=self.name, vocab_size=2**32 - 1, max_context=4096, dtype="none", device="cpu")
        return policy_pb2.GetPolicyInfoResponse(
            model=model, weights_version=self.weights_version, engine="fake", running=self.running
        )

    async def Chat(
        self, request: policy_pb2.PolicyServiceChatRequest, context: Any
    ) -> AsyncIterator[policy_pb2.PolicyServiceChatResponse]:
        if self.keep_requests:
            self.requests.append(request)
        if self.fail_with is not None:
            await context.abort(self.fail_with, "the fake policy was told to fail")
        if self.capacity is not None and self.running >= self.capacity:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self.capacity} calls are running, try later")
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            async for response in self._answer(request, context):
                yield response
            self.finished += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _answer(
        self, request: policy_pb2.PolicyServiceChatRequest, context: Any
    ) -> AsyncIterator[policy_pb2.PolicyServiceChatResponse]:
        replies = [_script(self.reply(request), request, i) for i in range(max(request.n, 1))]
        prompt_tokens = len(request.prompt.split()) + sum(len(m.content.split()) for m in request.messages)
        prompt_tokens += len(request.prompt_token_ids)
        unsent: dict[int, policy_pb2.PolicyServiceChatResponse] = {}
        if request.prompt_logprobs:
            words = re.findall(r"\s*\S+|\s+$", request.prompt or _text_of(request))
            for begin in range(0, len(words), 256):
                await asyncio.sleep(0)  # tests wait for others on this loop
                scored = [_token(word, request.top_logprobs) for word in words[begin : begin + 256]]
                text = "" if begin else _text_of(request)
                yield policy_pb2.PolicyServiceChatResponse(
                    prompt_logprobs=scored, prompt_text=text, prompt_tokens=prompt_tokens
                )
        for choice in range(len(replies) if self.thoughts or request.prompt_token_ids else 0):
            begun = policy_pb2.PolicyServiceChatResponse(
                choice_index=choice, reasoning_delta=self.thoughts, prompt_text=_text_of(request)
            )
            if request.whole:
                unsent[choice] = begun
            else:
                yield begun
        for position in range(max(len(words) for words, _, _ in replies) + 1):
            if self.fail_after_tokens == position:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the fake policy went away")
            if self.seconds_per_token:
                await asyncio.sleep(self.seconds_per_token)
            for choice, (words, finish, calls) in enumerate(replies):
                if position > len(words):
                    continue
                response = policy_pb2.PolicyServiceChatResponse(
                    choice_index=choice, prompt_tokens=prompt_tokens, weights_version=self.weights_version
                )
                if position < len(words):
                    response.delta = words[position]
                    response.tokens.append(_token(words[position], request.top_logprobs))
                    self.tokens_sent += 1
                response.completion_tokens = min(position + 1, len(words)) + bool(self.thoughts)
                response.reasoning_tokens = int(bool(self.thoughts))
                if position == len(words):
                    response.finish_reason = finish
                    response.tool_calls.extend(calls)
                if request.whole:
                    response = unsent[choice] = append_response(unsent.get(choice), response)
                    if position < len(words):
                        continue
                yield response


def _text_of(request: policy_pb2.PolicyServiceChatRequest) -> str:
    """Every token id is the word of its number."""
    return " ".join(map(str, request.prompt_token_ids))


def _script(
    reply: Reply, request: policy_pb2.PolicyServiceChatRequest, choice: int
) -> tuple[list[str], common_pb2.FinishReason, Sequence[common_pb2.ToolCall]]:
    """Words of one choice, why it ends, and its tool calls."""
    if not isinstance(reply, str):
        return [], common_pb2.FINISH_REASON_TOOL_CALLS, reply
    if choice:
        reply = f"{reply} ({choice})"
    for stop in request.stop:
        reply = reply.split(stop, 1)[0]
    words = re.findall(r"\s*\S+|\s+$", reply)
    limit = request.sampling.max_new_tokens
    if limit and len(words) > limit:
        return words[:limit], common_pb2.FINISH_REASON_LENGTH, ()
    return words, common_pb2.FINISH_REASON_STOP, ()


def _token(word: str, top: int) -> policy_pb2.TokenLogprob:
    raw = word.encode()
    token_id = zlib.crc32(raw)
    logprob = -math.log1p(token_id % 7)
    alternatives = [
        policy_pb2.TokenAlternative(token_id=token_id + i, text=word if i == 0 else f"{word}{i}", logprob=logprob - i)
        for i in range(top)
    ]
    return policy_pb2.TokenLogprob(token_id=token_id, text=word, logprob=logprob, top=alternatives, raw=raw)


@asynccontextmanager
async def serve_policy(policy: FakePolicy, port: int = 0) -> AsyncIterator[str]:
    """Runs the fake on a loopback port; yields `host:port`."""
    register = policy_pb2_grpc.add_PolicyServiceServicer_to_server
    server = Server(ServerConfig(drain_seconds=0), [(port, [(register, policy, SERVICE_NAME)])])
    await server.start()
    await server.ready()
    try:
        yield f"127.0.0.1:{server.ports[0]}"
    finally:
        await server.drain()
