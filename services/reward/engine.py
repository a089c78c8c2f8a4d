"""Scores answers with reward models and verifiable rewards; a failed answer never fails the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.reward.config import RewardConfig, ScorerConfig
from steersman.errors import InvalidArgumentError, SteersmanError
from steersman.nn.hardware import pick_device, pick_precision, set_threads, use_fast_exact_matmul
from steersman.nn.load import load_reward_model
from steersman.nn.tokens import tokenizer_fingerprint
from steersman.rewards import Answered, Failed, Outcome, Verdict, build_batch_reward, custom_reward
from steersman.v1 import common_pb2, reward_pb2


@dataclass(frozen=True, eq=False)
class Item:
    """One answer in its conversation."""

    messages: list[dict[str, Any]]
    """The last one is the answer; empty: only token ids were sent."""
    token_ids: list[int]
    """Prompt and response; empty: only messages were sent."""
    fingerprint: str
    """Of the tokenizer behind `token_ids`."""
    facts: dict[str, Any]
    tools: list[dict[str, Any]] | None = None
    """Tool definitions that the conversation's assistant had."""
    answer_length: int = 0
    """How many of `token_ids`, counted from the end, are the answer; 0: not said."""
    progress: tuple[int, int] = (0, 0)
    """Steps of the caller's training that are done, and all of them."""

    @property
    def answered(self) -> Answered:
        """What a verifiable reward sees of it."""
        ids = self.token_ids[len(self.token_ids) - self.answer_length :]
        return Answered(self.messages[:-1], self.messages[-1]["content"], self.facts, ids, self.progress)

    @property
    def tokens(self) -> int:
        """Cost of a batch; a guess where there are only messages."""
        return len(self.token_ids) or sum(len(message["content"]) for message in self.messages) // 3 + 1


@dataclass(frozen=True)
class Part:
    """What one scorer says of one item; `value` is None where it failed (`error` says why) or has nothing to say."""

    value: float | None
    aspects: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Scorer(Protocol):
    info: reward_pb2.ScorerInfo

    def score(self, items: Sequence[Item]) -> list[Part]:
        """One part an item, in order; failures of single items are parts, not exceptions."""
        ...


class ModelScorer:
    """A trained reward model; it takes token ids of its own tokenizer, and messages otherwise."""

    def __init__(self, config: ScorerConfig, device: str, precision: str) -> None:
        assert config.path is not None
        self._model = load_reward_model(config.path, device=device, precision=precision)  # type: ignore[arg-type]
        self._fingerprint = tokenizer_fingerprint(self._model.tokenizer)
        settings = self._model.settings
        self.info = reward_pb2.ScorerInfo(
            name=config.name,
            kind="model",
            weight=config.weight,
            model=common_pb2.ModelInfo(
                name=settings.name,
                tokenizer_fingerprint=self._fingerprint,
                max_context=settings.max_length,
                dtype=precision,
                device=device,
            ),
            mean=settings.mean,
            std=settings.std,
        )

    def score(self, items: Sequence[Item]) -> list[Part]:
        parts: list[Part | None] = [None] * len(items)
        rows: list[list[int]] = []
        places: list[int] = []
        for index, item in enumerate(items):
            try:
                rows.append(self._encode(item))
                places.append(index)
            except SteersmanError as error:
                parts[index] = Part(None, error=str(error))
        if rows:
            scores = self._model.score(rows, max_batch_tokens=sum(map(len, rows)) * 2)
            names = list(self._model.settings.aspects)
            for row, index in enumerate(places):
                aspects = (
                    dict(zip(names, scores.aspects[row].tolist(), strict=True)) if scores.aspects is not None else {}
                )
                parts[index] = Part(scores.reward[row].item(), aspects)
        return [part for part in parts if part is not None]

    def _encode(self, item: Item) -> list[int]:
        if item.token_ids and item.fingerprint == self._fingerprint:
            return self._model.check_length(item.token_ids)
        if not item.messages:
            raise InvalidArgumentError("the model has another tokenizer than the caller; send messages as well")
        return self._model.encode(item.messages, item.tools)


class VerifiableScorer:
    """A registered function, or somebody's own."""

    def __init__(self, config: ScorerConfig) -> None:
        if config.python is not None:
            self._reward = custom_reward(config.python, config.options)
        else:
            self._reward = build_batch_reward(config.type or config.name, config.options)
        self.info = reward_pb2.ScorerInfo(name=config.name, kind="verifiable", weight=config.weight, std=1.0)

    def score(self, items: Sequence[Item]) -> list[Part]:
        spoken = [index for index, item in enumerate(items) if item.messages]
        answered = [items[index].answered for index in spoken]
        try:
            outcomes = list(self._reward(answered)) if answered else []
        except Exception as error:
            outcomes = [Failed(f"{type(error).__name__}: {error}")] * len(answered)
        parts = [Part(None, error="a verifiable reward needs messages; send them")] * len(items)
        for index, outcome in zip(spoken, outcomes, strict=True):
            parts[index] = _part(outcome)
        return parts


def _part(outcome: Outcome) -> Part:
    if isinstance(outcome, Verdict):
        if not math.isfinite(outcome.value):
            return Part(None, error=f"{outcome.value} is no finite number")
        return Part(outcome.value, dict(outcome.criteria))
    return Part(None, error=outcome.reason) if outcome is not None else Part(None)


class RewardEngine:
    """All scorers of the service."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self.scorers: list[Scorer] = []

    def load(self) -> None:
        """Loads models and builds functions; errors name the folder or option."""
        config = self._config
        set_threads(config.threads)
        device = pick_device(config.device)
        precision = pick_precision(config.precision, device)
        if config.merge_requests:
            use_fast_exact_matmul()
        self.scorers = [
            ModelScorer(scorer, device, precision) if scorer.kind == "model" else VerifiableScorer(scorer)
            for scorer in config.scorers
        ]

    def score(self, items: list[Item]) -> list[reward_pb2.ItemScore]:
        """One result an item, in order."""
        columns = [checked_parts(scorer, items) for scorer in self.scorers]
        return [self._combine(row) for row in zip(*columns, strict=True)]

    def _combine(self, parts: Sequence[Part]) -> reward_pb2.ItemScore:
        result = reward_pb2.ItemScore()
        total, scored = 0.0, False
        for scorer, part in zip(self.scorers, parts, strict=True):
            info = scorer.info
            message = reward_pb2.RewardPart(name=info.name, weight=info.weight, aspects=part.aspects, error=part.error)
            if part.value is not None:
                message.value = part.value
            if part.value is not None and info.weight:
                total += info.weight * part.value
                scored = True
            elif info.weight and part.error:
                result.error = f"{info.name}: {part.error}"
            result.parts.append(message)
        if not scored and not result.error:
            names = ", ".join(scorer.info.name for scorer in self.scorers if scorer.info.weight)
            result.error = f"{names or 'no scorer with a weight'}: no reward for this answer (None)"
        if not result.error:
            result.reward = total
        return result


def checked_parts(scorer: Scorer, items: Sequence[Item]) -> list[Part]:
    """One part an item of any scorer: what it got wrong, as a whole or for one item, is a part without a value."""
    try:
        parts = scorer.score(items)
    except Exception as error:
        return [Part(None, error=str(error) or type(error).__name__)] * len(items)
    if len(parts) != len(items):
        return [Part(None, error=f"gave {len(parts)} values for {len(items)} answers")] * len(items)
    return [_finite(part) for part in parts]


def _finite(part: Part) -> Part:
    """The part, or one without a value where the value or an aspect is no finite number."""
    if part.value is None:
        return part
    if not isinstance(part.value, int | float) or not math.isfinite(part.value):
        return Part(None, error=f"gave {part.value!r}, which is no finite number")
    aspects = {name: value for name, value in part.aspects.items() if math.isfinite(value)}
    return Part(float(part.value), aspects, part.error)
