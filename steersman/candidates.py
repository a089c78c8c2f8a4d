"""Candidate answers for labelling: n answers to each prompt, from one or several models, through the policy service."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import grpc

from steersman.config.tls import ClientTls
from steersman.data.records import Row
from steersman.errors import RateLimitedError, SteersmanError, UnavailableError, from_grpc
from steersman.rpc.client import open_aio_channel
from steersman.rpc.conversation import to_message
from steersman.v1 import common_pb2, policy_pb2, policy_pb2_grpc

_TRIES = 4


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn."""

    n: int = 2
    """Answers a prompt and model."""
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    concurrency: int = 16
    """Prompts under way at once, over all models."""
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class Generated:
    """A prompt with its candidates, ready to become an item."""

    row: Row
    """The prompt's own row."""
    candidates: list[dict[str, Any]]
    """[{"messages", "model", "weights_version", "target"}] without empty and equal answers; two services may hold
    models of one name."""
    dropped: int
    """Answers left out because they were empty, cut off before any text, or equal to another."""


async def generate(
    targets: Sequence[str], rows: Iterable[Row], sampling: Sampling, tls: ClientTls | None = None
) -> AsyncIterator[Generated]:
    """Yields each prompt with the answers of every model, in the order of the rows.

    Args:
        targets: host:port of one policy service for each model.
        tls: certificates for all of them; None: plain text.
        rows: Rows of type Prompt (a preference's or feedback's prompt is taken as well).
        sampling: How to draw.

    Raises:
        SteersmanError: a service refused or stayed away after some tries; names the service.
    """
    channels = [open_aio_channel(target, tls) for target in targets]
    stubs = [
        (target, policy_pb2_grpc.PolicyServiceStub(channel)) for target, channel in zip(targets, channels, strict=True)
    ]
    gate = asyncio.Semaphore(sampling.concurrency)
    pending: list[asyncio.Task[Generated]] = []
    try:
        names = [await _model_name(target, stub, sampling) for target, stub in stubs]
        for index, row in enumerate(rows):
            pending.append(asyncio.create_task(_candidates(stubs, names, row, index, sampling, gate)))
            while len(pending) >= 2 * sampling.concurrency:
                yield await pending.pop(0)
        while pending:
            yield await pending.pop(0)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for channel in channels:
            await channel.close()


def choose(candidates: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """As many candidates as a project takes, in turn of every model: two of two models are one of each."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for candidate in candidates:
        by_model.setdefault(candidate["target"], []).append(candidate)
    rounds = zip_longest(*by_model.values())
    chosen = [candidate for round_ in rounds for candidate in round_ if candidate is not None][:most]
    return [{name: value for name, value in candidate.items() if name != "target"} for candidate in chosen]


async def _model_name(target: str, stub: Any, sampling: Sampling) -> str:
    try:
        info = await stub.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest(), timeout=sampling.timeout_seconds)
    except grpc.RpcError as error:
        raise from_grpc(error, f"policy {target}") from error
    return str(info.model.name)


async def _candidates(
    stubs: list[tuple[str, Any]], names: list[str], row: Row, index: int, sampling: Sampling, gate: asyncio.Semaphore
) -> Generated:
    async with gate:
        messages = [to_message(message.model_dump(exclude_none=True)) for message in getattr(row, "prompt", [])]
        found: list[dict[str, Any]] = []
        asked = 0
        for (target, stub), name in zip(stubs, names, strict=True):
            request = policy_pb2.PolicyServiceChatRequest(
                messages=messages,
                tools_json=json.dumps(row.tools) if row.tools else "",
                n=sampling.n,
                sampling=common_pb2.SamplingParams(
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=sampling.seed + index,
                ),
            )
            asked += sampling.n
            for text, version in await _answers(target, stub, request, sampling):
                answer = [{"role": "assistant", "content": text}]
                if text and all(answer != other["messages"] for other in found):
                    found.append({"messages": answer, "model": name, "weights_version": version, "target": target})
        return Generated(row, found, asked - len(found))


async def _answers(target: str, stub: Any, request: Any, sampling: Sampling) -> list[tuple[str, int]]:
    """Text and weights version of each choice; a service that is busy or away is asked again."""
    deadline = time.monotonic() + sampling.timeout_seconds
    for attempt in range(_TRIES):
        texts = [""] * request.n
        versions = [0] * request.n
        try:
            async for response in stub.Chat(request, timeout=max(0.1, deadline - time.monotonic())):
                texts[response.choice_index] += response.delta
                versions[response.choice_index] = response.weights_version
            return [(text.strip(), version) for text, version in zip(texts, versions, strict=True)]
        except grpc.RpcError as error:
            cause: SteersmanError = from_grpc(error, f"policy {target}")
            if not isinstance(cause, RateLimitedError | UnavailableError) or attempt == _TRIES - 1:
                raise cause from error
            await asyncio.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")
