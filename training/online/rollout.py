"""Samples of the policy, scored while others are still being generated.

    prompts -> policy service ~~ samples as they finish ~~> blocks -> reward service    -> scores
                                                                 `-> reference service -> log-probabilities

A block is a fixed set of neighbouring prompts; it is sent when the last of its samples has arrived, to the replica that
has the least to do. So scoring overlaps generation, and still what one scoring call holds does not depend on timing.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from steersman.config.manifest import Generation
from steersman.errors import FailedPreconditionError, InvalidArgumentError
from steersman.rpc.conversation import to_message
from steersman.rpc.wire import pack_rows
from steersman.v1 import common_pb2, reward_pb2
from training.batch import SampleBatch
from training.context import Reporter
from training.mathematics.rewards import present
from training.online.clients import ReferenceClient, RewardClient, Sample, Score
from training.online.pool import Lost, PolicyPool
from training.online.remote import calls

CUT_SHARE = 0.5
"""Share of answers at the token limit from which on it is said."""
BLOCKS = 4
"""Scoring calls a batch, at most."""

C = TypeVar("C")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt of the data."""

    ids: np.ndarray
    """int32 [P], rendered with the chat template up to the assistant's turn."""
    messages: list[dict[str, Any]]
    facts_json: str = ""
    key: str = ""
    """Identifies the row."""
    tools: list[dict[str, Any]] | None = None
    """Tool definitions that the assistant has."""


@dataclass(frozen=True, eq=False)
class Scored:
    """One finished and scored sample."""

    sample: Sample
    score: Score
    ref_logprobs: np.ndarray | None
    text: str


class _Replicas(Generic[C]):
    """Replicas of a service; a call goes to the one with the fewest calls under way."""

    def __init__(self, clients: Sequence[C]) -> None:
        self._clients = list(clients)
        self._busy = [0] * len(clients)

    def __bool__(self) -> bool:
        return bool(self._clients)

    @asynccontextmanager
    async def free(self) -> Any:
        place = self._busy.index(min(self._busy))
        self._busy[place] += 1
        try:
            yield self._clients[place]
        finally:
            self._busy[place] -= 1


class Rollouts:
    """Collects batches from the three services."""

    def __init__(
        self,
        policy: PolicyPool,
        reward: Sequence[RewardClient],
        reference: Sequence[ReferenceClient],
        decode: Callable[[np.ndarray], str],
        generation: Generation,
        stop_ids: Sequence[int],
        activity: Callable[[str], None],
        *,
        standardised: Mapping[str, float] = {},
        deterministic: bool = False,
        mask_top_p: float | None = None,
    ) -> None:
        """Args:
        policy: all replicas.
        reward: replicas of the reward service.
        reference: replicas of the reference service; empty: no reference log-probabilities.
        decode: response ids to text, special tokens left out.
        generation: sampling options.
        stop_ids: end an answer: the template's end of a turn as well as the model's own.
        activity: told what is going on, often.
        standardised: scorers whose values are standardised, with their weights.
        deterministic: what is generated together depends on the batch alone.
        mask_top_p: of a method that draws from the mask policy's sets.
        """
        self._mask_top_p = mask_top_p
        self.standardised = standardised
        self._policy = policy
        self._reward = _Replicas(reward)
        self._reference = _Replicas(reference)
        self._decode = decode
        self._generation = generation
        self._stop_ids = tuple(stop_ids)
        self._activity = activity
        self._deterministic = deterministic

    def collect(
        self,
        prompts: Sequence[Prompt],
        n: int,
        seed: int,
        *,
        first: int = 0,
        in_flight: bool = False,
        progress: tuple[int, int] = (0, 0),
    ) -> tuple[list[list[Scored]], dict[str, float]]:
        """`n` scored samples of every prompt, and where the time went.

        Args:
            seed: of the step; a sample's random numbers follow from it, the prompt's place and the sample's number.
            first: place of the first prompt among all of the step.
            in_flight: weights may be published meanwhile, see `PolicyPool.samples`.
            progress: steps of the training that are done, and all of them, for rewards that change with it.

        Returns:
            For every prompt its samples by sample index, and seconds and tokens of generation.
        """
        return calls().run(self._collect(prompts, n, seed, first, in_flight, progress))

    async def _collect(
        self, prompts: Sequence[Prompt], n: int, seed: int, first: int, in_flight: bool, progress: tuple[int, int]
    ) -> tuple[list[list[Scored]], dict[str, float]]:
        start = time.monotonic()
        size = math.ceil(len(prompts) / BLOCKS)
        missing = [n] * len(prompts)
        samples: list[list[Sample | Lost | None]] = [[None] * n for _ in prompts]
        blocks: dict[int, asyncio.Task[list[list[Scored]]]] = {}
        tokens = 0
        stream = self._policy.samples(
            [prompt.ids for prompt in prompts],
            n,
            self._sampling(seed),
            first=first,
            in_flight=in_flight,
            deterministic=self._deterministic,
        )
        try:
            done = 0
            async with aclosing(stream) as arriving:  # type: ignore[type-var]
                async for sample in arriving:
                    samples[sample.prompt_index][sample.sample_index] = sample
                    missing[sample.prompt_index] -= 1
                    tokens += len(sample.token_ids) if isinstance(sample, Sample) else 0
                    done += 1
                    self._activity(f"generating {done}/{n * len(prompts)}")
                    block = sample.prompt_index // size
                    low, high = block * size, min((block + 1) * size, len(prompts))
                    if not any(missing[low:high]):
                        blocks[block] = asyncio.create_task(self._score(prompts[low:high], samples[low:high], progress))
                    for task in blocks.values():
                        if task.done():
                            task.result()  # a failure ends the batch at once
            generated = time.monotonic()
            self._activity("scoring")
            scored = [rows for block in sorted(blocks) for rows in await blocks[block]]
        finally:
            for task in blocks.values():
                task.cancel()
        return scored, {
            "seconds_generate": generated - start,
            "seconds_score_tail": time.monotonic() - generated,
            "generated_tokens": float(tokens),
        }

    def _sampling(self, seed: int) -> common_pb2.SamplingParams:
        return common_pb2.SamplingParams(
            max_new_tokens=self._generation.max_new_tokens,
            temperature=self._generation.temperature,
            top_p=self._generation.top_p,
            top_k=self._generation.top_k,
            seed=seed,
            stop_token_ids=self._stop_ids,
            mask_top_p=self._mask_top_p,
        )

    async def _score(
        self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Any]], progress: tuple[int, int]
    ) -> list[list[Scored]]:
        """Reward and reference of one block, side by side; a lost sample has neither."""
        rows = [
            (prompt, sample)
            for prompt, group in zip(prompts, samples, strict=True)
            for sample in group
            if isinstance(sample, Sample)
        ]
        texts = [self._decode(sample.token_ids) for _, sample in rows]
        scores, references = await asyncio.gather(self._rewards(rows, texts, progress), self._reference_logprobs(rows))
        made = {
            id(sample): Scored(sample, score, ref, text)
            for (_, sample), score, ref, text in zip(rows, scores, references, texts, strict=True)
        }
        return [[made.get(id(sample)) or _unmade(sample) for sample in group] for group in samples]

    async def _rewards(
        self, rows: Sequence[tuple[Prompt, Sample]], texts: Sequence[str], progress: tuple[int, int]
    ) -> list[Score]:
        items = [score_item(prompt, sample.token_ids, text) for (prompt, sample), text in zip(rows, texts, strict=True)]
        if not items:
            return []
        async with self._reward.free() as client:
            return await client.score(items, progress)

    async def _reference_logprobs(self, rows: Sequence[tuple[Prompt, Sample]]) -> list[np.ndarray] | list[None]:
        if not self._reference or not rows:
            return [None] * len(rows)
        pairs = [(prompt.ids, sample.token_ids) for prompt, sample in rows]
        async with self._reference.free() as client:
            # The engine's log-probabilities of greedy answers are of the untempered distribution, too.
            return await client.logprobs(pairs, self._generation.temperature or 1.0)


def _unmade(lost: Lost) -> Scored:
    nothing = np.zeros(0, np.float32)
    sample = Sample(lost.prompt_index, lost.sample_index, np.zeros(0, np.int32), nothing, False, ())
    return Scored(sample, Score(math.nan, error=lost.reason), nothing, "")


def score_item(prompt: Prompt, token_ids: np.ndarray, text: str) -> reward_pb2.ScoreItem:
    """What the reward service needs of one answer."""
    return reward_pb2.ScoreItem(
        token_ids=pack_rows([np.concatenate([prompt.ids, token_ids])]),
        messages=[*map(to_message, prompt.messages), common_pb2.Message(role="assistant", content=text)],
        facts_json=prompt.facts_json,
        tools_json=json.dumps(prompt.tools) if prompt.tools else "",
        answer_length=len(token_ids),
    )


def to_batch(
    prompts: Sequence[Prompt], scored: Sequence[Sequence[Scored]], standardised: Mapping[str, float] = {}
) -> SampleBatch:
    """The batch of all samples; missing scores are NaN.

    Args:
        standardised: scorers whose values are standardised, with their weights.
    """
    flat = [(group, item) for group, items in enumerate(scored) for item in items]
    parts = [item.score.parts for _, item in flat]
    names = sorted({name for values in parts for name in values})

    def floats(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    def joined(rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *rows]))

    return SampleBatch(
        prompts=tuple(prompt.ids for prompt in prompts),
        responses=tuple(item.sample.token_ids for _, item in flat),
        loss_mask=tuple(item.sample.loss_mask for _, item in flat),
        group=torch.tensor([group for group, _ in flat]),
        lengths=torch.tensor([int(item.sample.loss_mask.sum()) for _, item in flat]),
        engine_logprobs=joined([item.sample.logprobs for _, item in flat]),
        ref_logprobs=joined([_own(item.ref_logprobs, item.sample) for _, item in flat]),
        scores=floats([reward_of(item.score) for _, item in flat]),
        parts={name: floats([values.get(name, math.nan) for values in parts]) for name in names},
        ended=torch.tensor([item.sample.ended for _, item in flat]),
        versions=torch.tensor([item.sample.versions[0] if item.sample.versions else 0 for _, item in flat]),
        standardised={name: weight for name, weight in standardised.items() if name in names},
    )


def _own(values: np.ndarray | None, sample: Sample) -> np.ndarray:
    """Of values for all tokens of a response those of the policy's own tokens."""
    if values is None:
        raise InvalidArgumentError("a sample has no reference log-probabilities; connect to the reference service")
    return values[sample.loss_mask]


def reward_of(score: Score) -> float:
    """NaN where it is missing: never 0."""
    return score.reward


def exclude_failed(
    batch: SampleBatch, scored: Sequence[Sequence[Scored]], max_share: float
) -> tuple[SampleBatch, dict[str, float]]:
    """Leaves out samples that cannot be learned from, and counts them.

    `failed`: no reward, or a log-probability that is not finite; `empty`: no tokens.

    Raises:
        FailedPreconditionError: too many failed (`check_share`), or none is left.
    """
    finite = batch.finite()
    keep = present(batch.scores, batch.lengths) & finite
    counts = {
        "failed": float(int((batch.scores.isnan() | ~finite).sum())),
        "empty": float(int(((batch.lengths == 0) & ~batch.scores.isnan()).sum())),
    }
    reasons = [score.error or "the reward is not finite" for score in missing_scores(scored)]
    if not bool(finite.all()):
        reasons.append("log-probabilities of the policy or the reference service are not finite")
    check_share(int(counts["failed"]), len(batch), reasons, max_share)
    if not bool(keep.any()):
        raise FailedPreconditionError(
            "no sample of the batch can be learned from: every answer is empty or has no reward; look at the policy "
            "service's stop tokens and at the reward service"
        )
    return batch.select(keep), counts


def missing_scores(scored: Sequence[Sequence[Scored]]) -> list[Score]:
    """Of the samples without a finite reward."""
    return [item.score for items in scored for item in items if math.isnan(reward_of(item.score))]


def check_share(failed: int, total: int, reasons: Iterable[str], max_share: float) -> None:
    """Raises FailedPreconditionError when more than `max_share` of all samples failed."""
    if failed > max_share * total:
        raise FailedPreconditionError(
            f"{failed} of {total} samples have no reward ({'; '.join(sorted(set(reasons)))[:300]}); the run pauses "
            "here: mend what is named and start the run again, it continues at this step"
        )


def warn_of_cut_answers(share: float, generation: Generation, reporter: Reporter) -> None:
    """Says so when most answers reach the token limit: what is rewarded and compared are then beginnings of answers."""
    if share > CUT_SHARE:
        reporter.note(
            f"warning: {share:.0%} of the answers were cut short at generation.maxNewTokens "
            f"{generation.max_new_tokens}; raise it, or train SFT until answers end"
        )


def cut_share(items: Iterable[Scored]) -> float:
    """Share of answers that did not end by themselves."""
    ended = [item.sample.ended for item in items]
    return 1.0 - sum(ended) / max(1, len(ended))


def count_failed(scored: Sequence[Sequence[Scored]], max_share: float) -> int:
    """Samples without a score; too many pause the run (`check_share`)."""
    missing = missing_scores(scored)
    total = sum(map(len, scored))
    check_share(len(missing), total, [score.error or "the reward is not finite" for score in missing], max_share)
    return len(missing)


def exclude_stale(batch: SampleBatch, ages: Tensor, limit: int) -> tuple[SampleBatch, int]:
    """Leaves out samples with a token that is older than `limit` steps, and counts them.

    Args:
        ages: int64 [N], steps between the oldest weights that made a token of the sample and the newest.

    Raises:
        FailedPreconditionError: none is left to learn from.
    """
    stale = ages > limit
    if bool(stale.all()):
        raise FailedPreconditionError(
            f"every sample of the batch is more than maxStaleness {limit} steps old: "
            "the policy service lags behind; look at its log, or raise maxStaleness"
        )
    return batch.select(~stale), int(stale.sum())
