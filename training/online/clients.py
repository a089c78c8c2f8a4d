"""The trainer's side of the contracts: policy replicas, reward and reference.

A service that is not there is waited for and the call repeated; what a service refuses is raised.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np

from steersman.errors import CancelledError, ConflictError, SteersmanError, UnavailableError, from_grpc
from steersman.rpc.client import open_channel, wait_ready
from steersman.rpc.wire import pack_rows, unpack_rows
from steersman.v1 import (
    common_pb2,
    policy_pb2,
    policy_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    weights_pb2,
    weights_pb2_grpc,
)
from training.online.publication import Outbox, WeightsPayload

CALL_SECONDS = 600.0
GENERATE_SECONDS = 6 * 3600.0
"""A batch is one call; that the other side is gone is noticed by keepalive, long before."""
MAX_FRUITLESS = 5
"""Calls in a row that may break off without a single new sample."""
_TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)

T = TypeVar("T")
Note = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Sample:
    """One finished sample of the policy service."""

    prompt_index: int
    sample_index: int
    token_ids: np.ndarray
    """int32 [R], the end-of-sequence token included."""
    logprobs: np.ndarray
    """float32 [R]"""
    ended: bool
    """It ended by itself, not by the token limit."""
    versions: tuple[int, ...]
    mask: np.ndarray | None = None
    """bool [R], the tokens that the policy itself made; None: all. `logprobs` are then those of the own tokens only."""

    @property
    def loss_mask(self) -> np.ndarray:
        return np.ones(len(self.token_ids), dtype=bool) if self.mask is None else self.mask


class _Remote:
    """A channel to one service that waits for it when it is gone."""

    def __init__(self, target: str, service: str, patience: float, note: Note) -> None:
        self.target = target
        self._service = service
        self._patience = patience
        self._note = note
        self._closed = threading.Event()
        self.channel = open_channel(target)

    def close(self) -> None:
        """Ends running calls and every wait: nobody wants the answers any more."""
        self._closed.set()
        self.channel.close()

    def wait(self) -> None:
        told = 0.0

        def tick(waited: float) -> None:
            nonlocal told
            self._check_open()
            if waited - told >= 3:
                told = waited
                self._note(f"waiting for {self._service} at {self.target} ({waited:.0f} s)")

        try:
            wait_ready(self.channel, self._service, self._patience, tick)
        except UnavailableError as error:
            raise UnavailableError(f"{self.target}: {error}") from None
        except ValueError:
            self._check_open()  # grpc's answer to a call on a closed channel
            raise

    def retrying(self, call: Callable[[], T]) -> T:
        """Repeats `call` while the service is away; gives up when it has been failing for longer than the patience."""
        failing_since: float | None = None
        while True:
            self._check_open()
            try:
                return call()
            except grpc.RpcError as error:
                self._check_open()
                now = time.monotonic()
                failing_since = failing_since or now
                if error.code() not in _TRANSIENT or now - failing_since > self._patience:
                    raise from_grpc(error, f"{self._service} at {self.target}") from None
                self._note(f"{self._service} at {self.target} went away; waiting for it")
                self._closed.wait(0.5)
                self.wait()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise CancelledError(f"{self._service} at {self.target} is not needed any more")


class PolicyReplica(_Remote):
    """One policy service: data plane and control plane."""

    def __init__(self, target: str, weights_target: str, patience: float, note: Note) -> None:
        super().__init__(target, "steersman.v1.PolicyService", patience, note)
        self._stub = policy_pb2_grpc.PolicyServiceStub(self.channel)
        self._weights_channel = open_channel(weights_target)
        self._weights = weights_pb2_grpc.WeightsServiceStub(self._weights_channel)

    def close(self) -> None:
        super().close()
        self._weights_channel.close()

    def info(self) -> policy_pb2.GetPolicyInfoResponse:
        return self.retrying(lambda: self._stub.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest(), timeout=30))

    def status(self) -> weights_pb2.GetWeightsStatusResponse:
        return self.retrying(lambda: self._weights.GetWeightsStatus(weights_pb2.GetWeightsStatusRequest(), timeout=30))

    def publish(self, version: int, outbox: Outbox) -> float:
        """Loads what is in the outbox as `version`; returns the seconds that generation stood still."""
        return self.retrying(lambda: self._publish(version, outbox))

    def _publish(self, version: int, outbox: Outbox) -> float:
        status = self._weights.GetWeightsStatus(weights_pb2.GetWeightsStatusRequest(), timeout=30)
        if status.pending_version:
            self._weights.AbortUpdate(weights_pb2.AbortUpdateRequest(version=status.pending_version), timeout=30)
        begin = weights_pb2.BeginUpdateRequest(version=version, manifest=outbox.manifest)
        if self._weights.BeginUpdate(begin, timeout=30).already_loaded:
            return 0.0
        if not outbox.manifest.artifact_url:
            self._weights.UploadChunks(outbox.chunks(version), timeout=CALL_SECONDS)
        return self._weights.CommitUpdate(
            weights_pb2.CommitUpdateRequest(version=version), timeout=CALL_SECONDS
        ).pause_seconds

    def generate(self, request: policy_pb2.GenerateRequest) -> Any:
        """The running call: an iterator of responses that can be cancelled."""
        return self._stub.Generate(request, timeout=GENERATE_SECONDS)


def _sample(response: policy_pb2.GenerateResponse) -> Sample:
    (tokens,) = unpack_rows(response.token_ids, np.int32, "token_ids")
    (logprobs,) = unpack_rows(response.logprobs, np.float32, "logprobs")
    return Sample(
        prompt_index=response.prompt_index,
        sample_index=response.sample_index,
        token_ids=tokens,
        logprobs=logprobs,
        ended=response.finish_reason == common_pb2.FINISH_REASON_STOP,
        versions=tuple(response.weights_versions),
    )


class PolicyPool:
    """All replicas as one: prompts are split over them, weights go to all of them or the batch fails."""

    def __init__(self, replicas: Sequence[PolicyReplica], fingerprint: str, folder: Path | None = None) -> None:
        """Args:
        folder: this run's own, seen by all replicas: weights go through it; None: over gRPC.

        Raises:
            StorageError: the folder cannot be written to.
        """
        self._replicas = list(replicas)
        self._fingerprint = fingerprint
        self._threads = ThreadPoolExecutor(len(self._replicas), thread_name_prefix="publish")
        self._publishing = threading.Lock()
        self._outbox = Outbox(folder)
        self._issued: set[int] = set()
        self.version: int | None = None
        """Version that the next batch must be made with; None: what the replicas started with."""
        for replica in self._replicas:
            replica.wait()

    def close(self) -> None:
        """Ends running calls."""
        for replica in self._replicas:
            replica.close()
        self._threads.shutdown(wait=False)
        self._outbox.close()

    def info(self) -> policy_pb2.GetPolicyInfoResponse:
        """Of the first replica; they run the same model."""
        return self._replicas[0].info()

    def publish(self, payload: WeightsPayload) -> float:
        """Loads the payload on every replica under one new version; returns the seconds it took.

        A replica that has this payload loaded already (a trainer that resumes) keeps it.
        """
        start = time.monotonic()
        with self._publishing:
            self._outbox.put(payload)
            statuses = list(self._threads.map(lambda replica: replica.status(), self._replicas))
            digest = self._outbox.manifest.digest
            same = {status.loaded_version for status in statuses if status.loaded_digest == digest}
            newest = max(status.loaded_version for status in statuses)
            version = newest if same == {newest} else newest + 1
            self._issued.add(version)
            list(self._threads.map(lambda replica: replica.publish(version, self._outbox), self._replicas))
            self.version = version
        return time.monotonic() - start

    def restore(self, replica: PolicyReplica) -> None:
        """Gives a replica that came back with other weights the published ones."""
        with self._publishing:
            if self.version is not None and replica.status().loaded_version != self.version:
                replica.publish(self.version, self._outbox)

    def may_have_made(self, versions: Sequence[int], in_flight: bool) -> bool:
        """Whether this pool published these weights: the last ones, or `in_flight` any."""
        return self.version is None or (self._issued if in_flight else {self.version}).issuperset(versions)

    def generate(
        self, prompts: Sequence[np.ndarray], n: int, sampling: common_pb2.SamplingParams, *, in_flight: bool = False
    ) -> Iterator[Sample]:
        """Samples of all prompts in the order in which they finish; `prompt_index` counts over all prompts.

        A replica that dies loses its part of the batch, which is made again once it is back with
        the same weights, so that the result is the same.

        Args:
            in_flight: weights may be published meanwhile; samples that are under way go on with the new ones.

        Raises:
            ConflictError: a token was made with weights that this pool has not published.
        """
        arrived: queue.Queue[Sample | BaseException | None] = queue.Queue()
        bounds = np.linspace(0, len(prompts), len(self._replicas) + 1).astype(int)
        request = policy_pb2.GenerateRequest(n=n, sampling=sampling, tokenizer_fingerprint=self._fingerprint)
        parts = [
            _Part(self, replica, prompts[low:high], int(low), request, in_flight)
            for replica, low, high in zip(self._replicas, bounds, bounds[1:], strict=False)
            if high > low
        ]
        for part in parts:
            threading.Thread(target=part.run, args=(arrived,), name="generate", daemon=True).start()
        running = len(parts)
        try:
            while running:
                item = arrived.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for part in parts:
                part.cancel()


class _Part:
    """What one replica makes of a batch."""

    def __init__(
        self,
        pool: PolicyPool,
        replica: PolicyReplica,
        prompts: Sequence[np.ndarray],
        offset: int,
        request: policy_pb2.GenerateRequest,
        in_flight: bool,
    ) -> None:
        self._pool = pool
        self._replica = replica
        self._offset = offset
        self._in_flight = in_flight
        self._request = policy_pb2.GenerateRequest(prompts=pack_rows(prompts))
        self._request.MergeFrom(request)
        self._missing = {(prompt, sample) for prompt in range(len(prompts)) for sample in range(request.n)}
        self._stop = threading.Event()
        self._call: Any = None

    def cancel(self) -> None:
        """Ends the call, so that the replica stops working on it."""
        self._stop.set()
        if self._call is not None:
            self._call.cancel()

    def run(self, arrived: queue.Queue[Sample | BaseException | None]) -> None:
        """Puts every sample once, and at the end None or what went wrong."""
        try:
            fruitless = 0
            while self._missing and not self._stop.is_set():
                before = len(self._missing)
                try:
                    for sample in self._samples():
                        arrived.put(sample)
                    if self._missing:
                        raise UnavailableError(f"policy service at {self._replica.target}: the stream ended early")
                except grpc.RpcError as error:
                    fruitless = fruitless + 1 if len(self._missing) == before else 0
                    self._recover(error, fruitless)
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    def _samples(self) -> Iterator[Sample]:
        if self._pool.version is not None:
            self._request.weights_version = self._pool.version
        self._call = self._replica.generate(self._request)
        if self._stop.is_set():
            self._call.cancel()
        for response in self._call:
            sample = _sample(response)
            if not self._pool.may_have_made(sample.versions, self._in_flight):
                raise ConflictError(
                    f"policy service at {self._replica.target} made a sample with weights {list(sample.versions)}, "
                    f"this run published {self._pool.version}; give every run a policy service of its own"
                )
            key = (sample.prompt_index, sample.sample_index)
            if key in self._missing:
                self._missing.remove(key)
                yield replace(sample, prompt_index=sample.prompt_index + self._offset)

    def _recover(self, error: grpc.RpcError, fruitless: int) -> None:
        """Waits until the replica is back and has the weights; raises what this does not mend."""
        other_weights = error.code() == grpc.StatusCode.FAILED_PRECONDITION
        if self._stop.is_set():
            raise CancelledError("generation was given up")
        if not (other_weights or error.code() in _TRANSIENT) or fruitless > MAX_FRUITLESS:
            raise from_grpc(error, f"policy service at {self._replica.target}") from None
        if not other_weights:
            self._stop.wait(0.5)
        self._pool.restore(self._replica)


class RewardClient(_Remote):
    """The reward service."""

    def __init__(self, target: str, fingerprint: str, patience: float, note: Note) -> None:
        super().__init__(target, "steersman.v1.RewardService", patience, note)
        self._stub = reward_pb2_grpc.RewardServiceStub(self.channel)
        self._fingerprint = fingerprint
        self.wait()

    def score(self, items: Sequence[reward_pb2.ScoreItem]) -> list[reward_pb2.ItemScore]:
        """One result an item, in order; items that failed have no reward but an error."""
        request = reward_pb2.ScoreRequest(items=items, tokenizer_fingerprint=self._fingerprint)
        return list(self.retrying(lambda: self._stub.Score(request, timeout=CALL_SECONDS)).scores)

    def standardised(self) -> dict[str, float]:
        """Weights of the scorers whose values have mean 0 and standard deviation 1 on a reference set."""
        info = self.retrying(lambda: self._stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=30))
        return {scorer.name: scorer.weight for scorer in info.scorers if scorer.kind == "model"}


class ReferenceClient(_Remote):
    """The reference service."""

    def __init__(self, target: str, fingerprint: str, patience: float, note: Note) -> None:
        super().__init__(target, "steersman.v1.ReferenceService", patience, note)
        self._stub = reference_pb2_grpc.ReferenceServiceStub(self.channel)
        self._fingerprint = fingerprint
        self.wait()

    def logprobs(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], temperature: float) -> list[np.ndarray]:
        """float32 [R] of every (prompt, response), in order."""
        request = reference_pb2.ComputeLogprobsRequest(
            token_ids=pack_rows([np.concatenate(row) for row in rows]),
            prompt_lengths=[len(prompt) for prompt, _ in rows],
            temperature=temperature,
            tokenizer_fingerprint=self._fingerprint,
        )
        response = self.retrying(lambda: self._stub.ComputeLogprobs(request, timeout=CALL_SECONDS))
        return unpack_rows(response.logprobs, np.float32, "logprobs")


def spread(clients: Sequence[T], index: int) -> T:
    """The client for the block with this index: blocks go round the replicas."""
    return clients[index % len(clients)]


def result_of(future: Future[T], service: str) -> T:
    """A future's result; an error of the tree passes, anything else names the service."""
    try:
        return future.result()
    except SteersmanError:
        raise
    except Exception as error:
        raise UnavailableError(f"{service}: {error}") from error
