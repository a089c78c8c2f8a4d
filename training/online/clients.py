"""The trainer's side of the contracts: policy replica, reward and reference.

A service that is away is waited for and the call repeated; one that fails is asked again; what it refuses is raised.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steersman.errors import InternalError
from steersman.rpc.client import Access
from steersman.rpc.wire import in_parts, pack_rows, unpack_rows
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
from training.online.publication import Outbox
from training.online.remote import FailingError, Note, Remote, calls

CALL_SECONDS = 600.0
GENERATE_SECONDS = 6 * 3600.0
"""A part of a batch is one call; that the other side is gone is noticed by keepalive, long before."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One finished sample of the policy service."""

    prompt_index: int
    sample_index: int
    token_ids: np.ndarray
    """int32 [R], the end-of-sequence token included."""
    logprobs: np.ndarray
    """float32 [R], or of the own tokens only where `mask` is given."""
    ended: bool
    """It ended by itself, not by the token limit."""
    versions: tuple[int, ...]
    mask: np.ndarray | None = None
    """bool [R], the tokens that the policy itself made; None: all."""

    @property
    def loss_mask(self) -> np.ndarray:
        return np.ones(len(self.token_ids), dtype=bool) if self.mask is None else self.mask


@dataclass(frozen=True, eq=False)
class Score:
    """What the reward service says of one sample."""

    reward: float
    """NaN: there is none, and `error` says why; never 0 for that."""
    parts: dict[str, float] = field(default_factory=dict)
    """What every scorer said, and its aspects as `scorer.aspect`; a scorer that failed is not in it."""
    error: str = ""


class PolicyReplica(Remote):
    """One policy service: data plane and control plane."""

    def __init__(
        self, target: str, weights_target: str, patience: float, note: Note, access: Access = Access()
    ) -> None:
        super().__init__((target, weights_target), "steersman.v1.PolicyService", patience, note, access)
        data, control = self.channels
        self._stub = policy_pb2_grpc.PolicyServiceStub(data)
        self._weights = weights_pb2_grpc.WeightsServiceStub(control)

    def info(self) -> policy_pb2.GetPolicyInfoResponse:
        return calls().run(self.call(lambda: self._stub.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest(), timeout=30)))

    def status(self) -> weights_pb2.GetWeightsStatusResponse:
        return calls().run(self.loaded())

    async def loaded(self) -> weights_pb2.GetWeightsStatusResponse:
        """Which weights it has."""
        request = weights_pb2.GetWeightsStatusRequest()
        return await self.call(lambda: self._weights.GetWeightsStatus(request, timeout=30))

    def publish(self, version: int, outbox: Outbox) -> float:
        """Loads what is in the outbox as `version`; returns the seconds that generation stood still."""
        return calls().run(self.load(version, outbox))

    async def load(self, version: int, outbox: Outbox) -> float:
        """The same for the event loop."""
        return await self.call(lambda: self._load(version, outbox))

    async def _load(self, version: int, outbox: Outbox) -> float:
        status = await self._weights.GetWeightsStatus(weights_pb2.GetWeightsStatusRequest(), timeout=30)
        if status.pending_version:
            await self._weights.AbortUpdate(weights_pb2.AbortUpdateRequest(version=status.pending_version), timeout=30)
        begin = weights_pb2.BeginUpdateRequest(version=version, manifest=outbox.manifest)
        if (await self._weights.BeginUpdate(begin, timeout=30)).already_loaded:
            return 0.0
        if not outbox.manifest.artifact_url:
            await self._weights.UploadChunks(outbox.chunks(version), timeout=CALL_SECONDS)
        commit = weights_pb2.CommitUpdateRequest(version=version)
        return (await self._weights.CommitUpdate(commit, timeout=CALL_SECONDS)).pause_seconds

    async def chat(self, request: policy_pb2.PolicyServiceChatRequest) -> list[policy_pb2.PolicyServiceChatResponse]:
        """The responses of one answer, which together are the whole of it."""

        async def answer() -> list[policy_pb2.PolicyServiceChatResponse]:
            return [response async for response in self._stub.Chat(request, timeout=CALL_SECONDS)]

        return await self.call(answer)

    async def generate(self, request: policy_pb2.GenerateRequest) -> AsyncIterator[Sample]:
        """Samples as they finish; leaving the iteration ends the call, so that the replica stops working on it."""
        call: Any = self._stub.Generate(request, timeout=GENERATE_SECONDS)
        try:
            async for response in call:
                yield sample_of(response)
        finally:
            call.cancel()


def sample_of(response: policy_pb2.GenerateResponse) -> Sample:
    """Domain type of the wire message."""
    (tokens,) = unpack_rows(response.token_ids, np.int32, "token_ids")
    (logprobs,) = unpack_rows(response.logprobs, np.float32, "logprobs")
    if len(tokens) != len(logprobs):
        raise FailingError(f"the policy service gave {len(logprobs)} log-probabilities for {len(tokens)} tokens")
    return Sample(
        prompt_index=response.prompt_index,
        sample_index=response.sample_index,
        token_ids=tokens,
        logprobs=logprobs,
        ended=response.finish_reason == common_pb2.FINISH_REASON_STOP,
        versions=tuple(response.weights_versions),
    )


class RewardClient(Remote):
    """One replica of the reward service."""

    def __init__(self, target: str, fingerprint: str, patience: float, note: Note, access: Access = Access()) -> None:
        super().__init__((target,), "steersman.v1.RewardService", patience, note, access)
        self._stub = reward_pb2_grpc.RewardServiceStub(self.channels[0])
        self._fingerprint = fingerprint
        self.wait()

    def info(self) -> reward_pb2.GetRewardInfoResponse:
        request = reward_pb2.GetRewardInfoRequest()
        return calls().run(self.call(lambda: self._stub.GetRewardInfo(request, timeout=30)))

    def standardised(self) -> dict[str, float]:
        """Weights of the scorers whose values have mean 0 and standard deviation 1 on a reference set."""
        return {scorer.name: scorer.weight for scorer in self.info().scorers if scorer.kind == "model"}

    async def score(self, items: Sequence[reward_pb2.ScoreItem], progress: tuple[int, int] = (0, 0)) -> list[Score]:
        """One score an item, in order; what cannot be scored has no reward but an error.

        Items that fail are sent once more in the same company: a batch of other rows rounds in other ways.

        Args:
            progress: steps of the training that are done, and all of them.
        """
        scores = await self._scores(items, progress)
        if any(math.isnan(score.reward) for score in scores):
            again = await self._scores(items, progress)
            scores = [new if math.isnan(old.reward) else old for old, new in zip(scores, again, strict=True)]
        return scores

    async def _scores(self, items: Sequence[reward_pb2.ScoreItem], progress: tuple[int, int]) -> list[Score]:
        found: list[Score] = []
        for part in in_parts([item.ByteSize() for item in items]):
            found += await self._scores_of(items[part], progress)
        return found

    async def _scores_of(self, items: Sequence[reward_pb2.ScoreItem], progress: tuple[int, int]) -> list[Score]:
        done, steps = progress
        request = reward_pb2.ScoreRequest(
            items=items,
            tokenizer_fingerprint=self._fingerprint,
            progress=reward_pb2.TrainingProgress(step=done, steps=steps),
        )
        try:
            response = await self.call(lambda: self._stub.Score(request, timeout=CALL_SECONDS))
        except FailingError as error:
            return [Score(math.nan, error=str(error))] * len(items)
        if len(response.scores) != len(items):
            text = f"{self.name} gave {len(response.scores)} scores for {len(items)} answers"
            return [Score(math.nan, error=text)] * len(items)
        return [score_of(score) for score in response.scores]


def score_of(score: reward_pb2.ItemScore) -> Score:
    """Domain type of the wire message; a reward that is not finite is missing."""
    parts = {}
    for part in score.parts:
        if part.HasField("value"):
            parts[part.name] = part.value
        parts |= {f"{part.name}.{aspect}": value for aspect, value in part.aspects.items()}
    if score.HasField("reward") and math.isfinite(score.reward):
        return Score(score.reward, parts)
    bad = [part.name for part in score.parts if part.HasField("value") and not math.isfinite(part.value)]
    error = score.error or f"{', '.join(bad) or 'the reward'}: the value is not finite"
    return Score(math.nan, parts, error)


class ReferenceClient(Remote):
    """One replica of the reference service."""

    def __init__(self, target: str, fingerprint: str, patience: float, note: Note, access: Access = Access()) -> None:
        super().__init__((target,), "steersman.v1.ReferenceService", patience, note, access)
        self._stub = reference_pb2_grpc.ReferenceServiceStub(self.channels[0])
        self._fingerprint = fingerprint
        self.wait()

    async def logprobs(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], temperature: float) -> list[np.ndarray]:
        """float32 [R] of every (prompt, response), in order; all NaN where the service could not compute them."""
        found: list[np.ndarray] = []
        for part in in_parts([4 * (len(prompt) + len(response)) for prompt, response in rows]):
            found += await self._logprobs_of(rows[part], temperature)
        return found

    async def _logprobs_of(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], temperature: float) -> list[np.ndarray]:
        request = reference_pb2.ComputeLogprobsRequest(
            token_ids=pack_rows([np.concatenate(row) for row in rows]),
            prompt_lengths=[len(prompt) for prompt, _ in rows],
            temperature=temperature,
            tokenizer_fingerprint=self._fingerprint,
        )
        missing = [np.full(len(response), np.nan, np.float32) for _, response in rows]
        try:
            response = await self.call(lambda: self._stub.ComputeLogprobs(request, timeout=CALL_SECONDS))
        except FailingError:
            return missing
        found = unpack_rows(response.logprobs, np.float32, "logprobs")
        if [len(row) for row in found] != [len(row) for row in missing]:
            raise InternalError(f"{self.name} gave log-probabilities of other lengths than the answers have")
        return found
