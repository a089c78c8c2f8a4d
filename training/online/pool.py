"""All policy replicas as one: work goes to the replica that is free, weights to all of them.

    batch -> parts of neighbouring prompts -> queue -> replica 1 ~~ samples ~~>  one stream
                                                 `---> replica 2 ~~ samples ~~^

A sample's random numbers follow from its place in the batch, so which replica made it, and how many there are, changes
nothing but the rounding of the arithmetic; with `deterministic` not even that.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import numpy as np

from steersman.errors import ConflictError, FailedPreconditionError, SteersmanError, UnavailableError, from_grpc
from steersman.rpc.wire import in_parts, pack_rows
from steersman.v1 import common_pb2, policy_pb2
from training.online.clients import PolicyReplica, Sample
from training.online.publication import Outbox, WeightsPayload
from training.online.remote import AWAY, FAILING, calls

PARTS = 4
"""Parts that a replica gets of a batch, if all are equally fast."""
AT_ONCE = 2
"""Parts that a replica works on at the same time, so that it never waits for the next one."""
MAX_FRUITLESS = 5
"""Calls in a row for one part that may break off without a single new sample."""


@dataclass(frozen=True)
class Lost:
    """A sample that no replica could make."""

    prompt_index: int
    sample_index: int
    reason: str


@dataclass(eq=False)
class _Part:
    """Neighbouring prompts of a batch, and which of their samples are missing still."""

    low: int
    high: int
    missing: set[tuple[int, int]]
    """(prompt of the batch, sample)"""
    fruitless: int = 0


@dataclass(eq=False)
class _Batch:
    """What the workers of one batch share."""

    request: policy_pb2.GenerateRequest
    prompts: Sequence[np.ndarray]
    in_flight: bool
    waiting: deque[_Part]
    arrived: asyncio.Queue[Sample | Lost | BaseException]
    open_parts: int
    workers: int
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class _Gone(Exception):
    """A replica stays away; the others go on without it."""


class PolicyPool:
    """All replicas; weights go to all of them or the batch fails."""

    def __init__(self, replicas: Sequence[PolicyReplica], fingerprint: str, folder: Path | None = None) -> None:
        """Args:
        folder: this run's own, seen by all replicas: weights go through it; None: over gRPC.

        Raises:
            StorageError: the folder cannot be written to.
        """
        self._replicas = list(replicas)
        self._fingerprint = fingerprint
        self._outbox = Outbox(folder)
        self._issued: set[int] = set()
        self._restoring: asyncio.Lock | None = None
        self.version: int | None = None
        """Version that the next batch must be made with; None: what the replicas started with."""
        for replica in self._replicas:
            replica.wait()

    def close(self) -> None:
        """Ends running calls."""
        for replica in self._replicas:
            replica.close()
        self._outbox.close()

    def info(self) -> policy_pb2.GetPolicyInfoResponse:
        """Of the first replica; they run the same model."""
        return self._replicas[0].info()

    def leave_device(self) -> None:
        """Weights go through the folder's file also where trainer and replicas share a GPU."""
        self._outbox.leave_device()

    def chat(self, request: policy_pb2.PolicyServiceChatRequest) -> list[policy_pb2.PolicyServiceChatResponse]:
        """One answer of the first replica; they run the same model."""
        return calls().run(self._replicas[0].chat(request))

    # -- weights ---------------------------------------------------------------------------------

    def publish(self, payload: WeightsPayload) -> float:
        """Loads the payload on every replica under one new version; returns the seconds it took.

        A replica that has this payload loaded already (a trainer that resumes) keeps it.
        """
        start = time.monotonic()
        calls().run(self._publish(payload))
        return time.monotonic() - start

    async def _publish(self, payload: WeightsPayload) -> None:
        async with self._one_at_a_time():
            await asyncio.to_thread(self._outbox.put, payload)
            statuses = await asyncio.gather(*(replica.loaded() for replica in self._replicas))
            digest = self._outbox.manifest.digest
            same = {status.loaded_version for status in statuses if status.loaded_digest == digest}
            newest = max(status.loaded_version for status in statuses)
            version = newest if same == {newest} else newest + 1
            self._issued.add(version)
            try:
                await asyncio.gather(*(replica.load(version, self._outbox) for replica in self._replicas))
            except FailedPreconditionError:
                if not self._outbox.on_device:
                    raise
                self._outbox.leave_device()  # a replica is on another GPU, or cannot read this one's memory
            else:
                self.version = version
                return
        await self._publish(payload)

    async def _restore(self, replica: PolicyReplica) -> None:
        """Gives a replica that came back with other weights the published ones."""
        async with self._one_at_a_time():
            if self.version is not None and (await replica.loaded()).loaded_version != self.version:
                await replica.load(self.version, self._outbox)

    def _one_at_a_time(self) -> asyncio.Lock:
        if self._restoring is None:
            self._restoring = asyncio.Lock()
        return self._restoring

    def may_have_made(self, versions: Sequence[int], in_flight: bool) -> bool:
        """Whether this pool published these weights: the last ones, or `in_flight` any."""
        return self.version is None or (self._issued if in_flight else {self.version}).issuperset(versions)

    # -- samples ---------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[np.ndarray], n: int, sampling: common_pb2.SamplingParams) -> Iterator[Sample]:
        """`samples` for callers without an event loop; raises what a lost sample's reason says."""

        async def collect() -> list[Sample | Lost]:
            return [one async for one in self.samples(prompts, n, sampling)]

        for one in calls().run(collect()):
            if isinstance(one, Lost):
                raise UnavailableError(one.reason)
            yield one

    async def samples(
        self,
        prompts: Sequence[np.ndarray],
        n: int,
        sampling: common_pb2.SamplingParams,
        *,
        first: int = 0,
        in_flight: bool = False,
        deterministic: bool = False,
    ) -> AsyncIterator[Sample | Lost]:
        """Samples of all prompts in the order in which they finish; `prompt_index` counts over all prompts.

        A replica that dies loses its parts of the batch, which any other makes, or it itself once it is back with the
        same weights.

        Args:
            first: place of the first prompt in the caller's batch, from which random numbers follow.
            in_flight: weights may be published meanwhile; samples that are under way go on with the new ones.
            deterministic: what a replica computes together depends on the batch alone, not on replicas and timing.

        Raises:
            ConflictError: a token was made with weights that this pool has not published.
            UnavailableError: no replica is left.
        """
        request = policy_pb2.GenerateRequest(
            n=n, sampling=sampling, tokenizer_fingerprint=self._fingerprint, first_prompt=first
        )
        count = 1 if len(self._replicas) == 1 else PARTS * len(self._replicas)
        cuts = PARTS if deterministic else count
        largest = {part.start for part in in_parts([4 * len(prompt) for prompt in prompts])}
        bounds = sorted(largest | {len(prompts) * cut // cuts for cut in range(cuts + 1)})
        parts = [
            _Part(low, high, {(prompt, sample) for prompt in range(low, high) for sample in range(n)})
            for low, high in itertools.pairwise(bounds)
        ]
        at_once = 1 if deterministic or count == 1 else AT_ONCE
        batch = _Batch(
            request, prompts, in_flight, deque(parts), asyncio.Queue(), len(parts), at_once * len(self._replicas)
        )
        workers = [
            asyncio.create_task(self._work(batch, replica)) for replica in self._replicas for _ in range(at_once)
        ]
        try:
            left = len(prompts) * n
            while left:
                one = await self._next(batch, workers)
                left -= 1
                yield one
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _next(self, batch: _Batch, workers: Sequence[asyncio.Task[None]]) -> Sample | Lost:
        """The next arrival; raises what ended the last worker, when none is left."""
        arrival = asyncio.ensure_future(batch.arrived.get())
        try:
            while not arrival.done():
                running = [worker for worker in workers if not worker.done()]
                if not running and batch.arrived.empty():
                    raise UnavailableError("no policy replica is left")
                await asyncio.wait([arrival, *running], return_when=asyncio.FIRST_COMPLETED)
            one = arrival.result()
        finally:
            arrival.cancel()
        if isinstance(one, BaseException):
            raise one
        return one

    async def _work(self, batch: _Batch, replica: PolicyReplica) -> None:
        """Takes parts until all are made; a replica that stays away leaves them to the others."""
        try:
            while batch.open_parts:
                if not batch.waiting:
                    batch.changed.clear()
                    await batch.changed.wait()
                    continue
                part = batch.waiting.popleft()
                before = len(part.missing)
                try:
                    await self._make(batch, part, replica)
                    batch.open_parts -= 1
                except (grpc.RpcError, SteersmanError) as error:
                    part.fruitless = part.fruitless + 1 if len(part.missing) == before else 0
                    problem = await self._recover(batch, part, replica, error)
                    if problem is not None:
                        if not isinstance(problem, _Gone):
                            batch.arrived.put_nowait(problem)
                        return
                finally:
                    batch.changed.set()
        except Exception as error:
            batch.arrived.put_nowait(error)

    async def _make(self, batch: _Batch, part: _Part, replica: PolicyReplica) -> None:
        """Puts the part's missing samples as they arrive."""
        request = policy_pb2.GenerateRequest(prompts=pack_rows(batch.prompts[part.low : part.high]))
        request.MergeFrom(batch.request)
        request.first_prompt += part.low
        if self.version is not None:
            request.weights_version = self.version
        async with aclosing(replica.generate(request)) as stream:  # type: ignore[type-var]
            async for sample in stream:
                if not self.may_have_made(sample.versions, batch.in_flight):
                    raise ConflictError(
                        f"policy service at {replica.target} made a sample with weights {list(sample.versions)}, "
                        f"this run published {self.version}; give every run a policy service of its own"
                    )
                key = (sample.prompt_index + part.low, sample.sample_index)
                if key in part.missing:
                    part.missing.remove(key)
                    batch.arrived.put_nowait(replace(sample, prompt_index=key[0]))
        if part.missing:
            raise UnavailableError(f"policy service at {replica.target}: the stream ended early")

    async def _recover(
        self, batch: _Batch, part: _Part, replica: PolicyReplica, error: Exception
    ) -> BaseException | None:
        """Gives the part back to the queue and waits for the replica; returns what ends the batch."""
        code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE
        if isinstance(error, SteersmanError) and not isinstance(error, UnavailableError):
            return error
        name = f"policy service at {replica.target}"
        cause = from_grpc(error, name) if isinstance(error, grpc.RpcError) else error
        replica.check_open()
        if code not in (*AWAY, *FAILING, grpc.StatusCode.FAILED_PRECONDITION):
            return cause
        if part.fruitless > MAX_FRUITLESS:
            if code not in FAILING:
                return cause
            for prompt, sample in sorted(part.missing):
                batch.arrived.put_nowait(Lost(prompt, sample, str(cause)))
            part.missing.clear()
            batch.open_parts -= 1
            return None
        batch.waiting.appendleft(part)
        batch.changed.set()
        if code != grpc.StatusCode.FAILED_PRECONDITION:
            await asyncio.sleep(min(0.25 * math.exp2(part.fruitless), 4.0))
        try:
            await replica.ready()
        except UnavailableError as gone:
            batch.workers -= 1
            return _Gone() if batch.workers else gone
        await self._restore(replica)
        return None
