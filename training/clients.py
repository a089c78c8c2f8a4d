"""The trainer's side of the contracts: policy replicas, reward and reference.

A service that is not there is waited for and the call repeated; what a service refuses is raised.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import grpc
import numpy as np
from safetensors.torch import save
from torch import Tensor

from steersman.errors import CancelledError, SteersmanError, UnavailableError, from_grpc
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

CHUNK_BYTES = 4 * 1024 * 1024
CALL_SECONDS = 600.0
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


@dataclass(frozen=True, eq=False)
class WeightsPayload:
    """What one publication sends to every replica."""

    kind: Literal["full", "lora"]
    data: bytes
    sha256: str
    adapter_config: dict[str, Any] | None

    @staticmethod
    def of(
        kind: Literal["full", "lora"], tensors: dict[str, Tensor], adapter_config: dict[str, Any] | None = None
    ) -> WeightsPayload:
        data = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
        return WeightsPayload(kind, data, hashlib.sha256(data).hexdigest(), adapter_config)


class _Remote:
    """A channel to one service that waits for it when it is gone."""

    def __init__(self, target: str, service: str, patience: float, note: Note) -> None:
        self.target = target
        self._service = service
        self._patience = patience
        self._note = note
        self.channel = open_channel(target)

    def wait(self) -> None:
        told = 0.0

        def tick(waited: float) -> None:
            nonlocal told
            if waited - told >= 3:
                told = waited
                self._note(f"waiting for {self._service} at {self.target} ({waited:.0f} s)")

        try:
            wait_ready(self.channel, self._service, self._patience, tick)
        except UnavailableError as error:
            raise UnavailableError(f"{self.target}: {error}") from None

    def retrying(self, call: Callable[[], T]) -> T:
        """Repeats `call` while the service is away; gives up after the patience."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                if error.code() not in _TRANSIENT or time.monotonic() > deadline:
                    raise from_grpc(error, f"{self._service} at {self.target}") from None
                self._note(f"{self._service} at {self.target} went away; waiting for it")
                time.sleep(0.5)
                self.wait()


class PolicyReplica(_Remote):
    """One policy service: data plane and control plane."""

    def __init__(self, target: str, weights_target: str, patience: float, note: Note) -> None:
        super().__init__(target, "steersman.v1.PolicyService", patience, note)
        self._stub = policy_pb2_grpc.PolicyServiceStub(self.channel)
        self._weights = weights_pb2_grpc.WeightsServiceStub(open_channel(weights_target))

    def info(self) -> policy_pb2.GetPolicyInfoResponse:
        return self.retrying(lambda: self._stub.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest(), timeout=30))

    def status(self) -> weights_pb2.GetWeightsStatusResponse:
        return self.retrying(lambda: self._weights.GetWeightsStatus(weights_pb2.GetWeightsStatusRequest(), timeout=30))

    def publish(self, version: int, payload: WeightsPayload) -> float:
        """Loads the payload as `version`; returns the seconds that generation stood still."""
        return self.retrying(lambda: self._publish(version, payload))

    def _publish(self, version: int, payload: WeightsPayload) -> float:
        status = self._weights.GetWeightsStatus(weights_pb2.GetWeightsStatusRequest(), timeout=30)
        if status.pending_version:
            self._weights.AbortUpdate(weights_pb2.AbortUpdateRequest(version=status.pending_version), timeout=30)
        kind = weights_pb2.WEIGHTS_KIND_LORA if payload.kind == "lora" else weights_pb2.WEIGHTS_KIND_FULL
        begin = weights_pb2.BeginUpdateRequest(
            version=version,
            manifest=weights_pb2.WeightsManifest(
                kind=kind,  # type: ignore[arg-type]
                size=len(payload.data),
                sha256=payload.sha256,
                adapter_config_json=json.dumps(payload.adapter_config) if payload.adapter_config else "",
            ),
        )
        if self._weights.BeginUpdate(begin, timeout=30).already_loaded:
            return 0.0
        self._weights.UploadChunks(_chunks(version, payload.data), timeout=CALL_SECONDS)
        return self._weights.CommitUpdate(
            weights_pb2.CommitUpdateRequest(version=version), timeout=CALL_SECONDS
        ).pause_seconds

    def generate(self, request: policy_pb2.GenerateRequest) -> Iterator[Sample]:
        """Streams samples as they finish; a grpc.RpcError passes through."""
        for response in self._stub.Generate(request, timeout=CALL_SECONDS):
            (tokens,) = unpack_rows(response.token_ids, np.int32, "token_ids")
            (logprobs,) = unpack_rows(response.logprobs, np.float32, "logprobs")
            yield Sample(
                prompt_index=response.prompt_index,
                sample_index=response.sample_index,
                token_ids=tokens,
                logprobs=logprobs,
                ended=response.finish_reason == common_pb2.FINISH_REASON_STOP,
                versions=tuple(response.weights_versions),
            )


def _chunks(version: int, data: bytes) -> Iterator[weights_pb2.UploadChunksRequest]:
    for offset in range(0, len(data), CHUNK_BYTES):
        part = data[offset : offset + CHUNK_BYTES]
        yield weights_pb2.UploadChunksRequest(version=version, offset=offset, data=part, crc32=zlib.crc32(part))


class PolicyPool:
    """All replicas as one: prompts are split over them, weights go to all of them or the batch fails."""

    def __init__(self, replicas: Sequence[PolicyReplica], fingerprint: str) -> None:
        self._replicas = list(replicas)
        self._fingerprint = fingerprint
        self._threads = ThreadPoolExecutor(len(self._replicas), thread_name_prefix="policy")
        self._published: WeightsPayload | None = None
        self.version: int | None = None
        """Version that the next batch must be made with; None: what the replicas started with."""
        for replica in self._replicas:
            replica.wait()

    def info(self) -> policy_pb2.GetPolicyInfoResponse:
        """Of the first replica; they run the same model."""
        return self._replicas[0].info()

    def publish(self, payload: WeightsPayload) -> float:
        """Loads the payload on every replica under one new version; returns the seconds it took.

        A replica that has this payload loaded already (a trainer that resumes) keeps it.
        """
        start = time.monotonic()
        statuses = list(self._threads.map(lambda replica: replica.status(), self._replicas))
        same = {status.loaded_version for status in statuses if status.loaded_sha256 == payload.sha256}
        newest = max(status.loaded_version for status in statuses)
        version = newest if len(same) == 1 and newest in same else newest + 1
        list(self._threads.map(lambda replica: replica.publish(version, payload), self._replicas))
        self._published, self.version = payload, version
        return time.monotonic() - start

    def generate(self, prompts: Sequence[np.ndarray], n: int, sampling: common_pb2.SamplingParams) -> Iterator[Sample]:
        """Samples of all prompts in the order in which they finish; `prompt_index` counts over all prompts.

        A replica that dies loses its part of the batch, which is made again once it is back with
        the same weights, so that the result is the same.
        """
        arrived: queue.Queue[Sample | BaseException | None] = queue.Queue()
        bounds = np.linspace(0, len(prompts), len(self._replicas) + 1).astype(int)
        parts = [
            (replica, lo, hi) for replica, lo, hi in zip(self._replicas, bounds, bounds[1:], strict=False) if hi > lo
        ]
        stop = threading.Event()

        def work(replica: PolicyReplica, low: int, high: int) -> None:
            try:
                for sample in self._part(replica, prompts[low:high], n, sampling, stop):
                    arrived.put(
                        Sample(
                            sample.prompt_index + low,
                            sample.sample_index,
                            sample.token_ids,
                            sample.logprobs,
                            sample.ended,
                            sample.versions,
                        )
                    )
                arrived.put(None)
            except BaseException as error:
                arrived.put(error)

        for part in parts:
            self._threads.submit(work, *part)
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
            stop.set()

    def _part(
        self,
        replica: PolicyReplica,
        prompts: Sequence[np.ndarray],
        n: int,
        sampling: common_pb2.SamplingParams,
        stop: threading.Event,
    ) -> Iterator[Sample]:
        request = policy_pb2.GenerateRequest(
            prompts=pack_rows(prompts), n=n, sampling=sampling, tokenizer_fingerprint=self._fingerprint
        )
        if self.version is not None:
            request.weights_version = self.version
        seen: set[tuple[int, int]] = set()
        while not stop.is_set():
            try:
                for sample in replica.generate(request):
                    key = (sample.prompt_index, sample.sample_index)
                    if key not in seen:
                        seen.add(key)
                        yield sample
                return
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION and self._published is not None:
                    pass  # the replica came back with the weights that it was started with
                elif error.code() not in _TRANSIENT:
                    raise from_grpc(error, f"policy service at {replica.target}") from None
                replica.retrying(replica.info)
                if self._published is not None and self.version is not None:
                    replica.publish(self.version, self._published)
        raise CancelledError("generation was given up")


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
