"""What the loop asks of an online method, and the registry.

    scores, log-probabilities, values  -> estimate ->  what the batch teaches  -> loss, a micro-batch at a time

The loop knows no method's name. What a method needs beside `estimate` and `loss` it says in the attributes below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from steersman.config.algorithms import Critic, MethodOptions
from steersman.config.manifest import RlStage
from training.batch import MicroBatch, SampleBatch
from training.mathematics import kl as kl_estimators
from training.mathematics import mismatch, rewards, segments
from training.mathematics.losses import KlTerm, PolicyStats, ValueStats
from training.mathematics.moments import whiten


@dataclass(frozen=True, eq=False)
class Estimates:
    """What one batch teaches, from the policy that is about to be updated."""

    old_logprobs: Tensor
    """fp32 [T], of the trainer's own forward pass."""
    kl: Tensor
    """fp32 [T], k1 to the reference."""
    advantages: Tensor
    """fp32 [T], one a token, or [N], one a sample, as the method's loss takes them."""
    old_values: Tensor | None = None
    """fp32 [T]; None without a critic."""
    returns: Tensor | None = None
    """fp32 [T]; None without a critic."""


@dataclass(frozen=True, eq=False)
class Part:
    """The samples of one micro-batch, on the model's device: n samples, t tokens."""

    lengths: Tensor
    """int64 [n]"""
    group: Tensor
    """int64 [n], the prompt of every sample."""
    old_logprobs: Tensor
    """fp32 [t]"""
    engine_logprobs: Tensor
    """fp32 [t]"""
    ref_logprobs: Tensor
    """fp32 [t]"""
    advantages: Tensor
    """fp32 [t] or [n], as estimated."""
    old_values: Tensor | None
    """fp32 [t]"""
    returns: Tensor | None
    """fp32 [t]"""
    only_critic: bool
    """The critic warms up: nothing may reach the policy."""

    @staticmethod
    def of(batch: SampleBatch, estimates: Estimates, micro: MicroBatch, device: Any, only_critic: bool) -> Part:
        def tokens(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[micro.tokens].to(device)

        per_sample = estimates.advantages.shape == batch.lengths.shape != estimates.old_logprobs.shape
        return Part(
            lengths=batch.lengths[micro.samples].to(device),
            group=batch.group[micro.samples].to(device),
            old_logprobs=estimates.old_logprobs[micro.tokens].to(device),
            engine_logprobs=batch.engine_logprobs[micro.tokens].to(device),
            ref_logprobs=batch.ref_logprobs[micro.tokens].to(device),
            advantages=estimates.advantages[micro.samples if per_sample else micro.tokens].to(device),
            old_values=tokens(estimates.old_values),
            returns=tokens(estimates.returns),
            only_critic=only_critic,
        )


class ForwardPass(Protocol):
    """Of one micro-batch, with a graph; see `training.online.policy_model.Forward`."""

    @property
    def logprobs(self) -> Tensor: ...
    @property
    def values(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Totals:
    """Counts of a whole optimizer step, over all micro-batches and ranks."""

    tokens: int
    """The policy's own tokens."""
    samples: int
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Of the step's samples or tokens."""


@dataclass(frozen=True)
class LossStats:
    """Statistics of a loss; those of values are empty without a critic."""

    policy: PolicyStats
    value: ValueStats = field(default_factory=ValueStats)


@dataclass(frozen=True)
class Mask:
    """Tokens are drawn from the top-p set of an older policy; log-probabilities are of that distribution."""

    top_p: float
    refresh_every: int
    """Steps after which the policy becomes the mask policy."""


class Method(Protocol):
    """One online method."""

    critic: Critic | None
    """Where values come from; None: it has none."""
    ptx_coefficient: float
    """Weight of the language-model loss on demonstrations (PPO-ptx); 0: off."""
    whole_groups: bool
    """The loss compares samples of a prompt: they must share a micro-batch."""
    rounds: int
    """Rounds of sampling a step at most, until every prompt of the step teaches something (`informative`)."""
    mask: Mask | None
    """None: the policy's whole distribution."""

    def informative(self, batch: SampleBatch) -> Tensor:
        """bool [N]: samples worth training on, as far as their scores tell."""
        ...

    def estimate(self, batch: SampleBatch, old: Tensor, values: Tensor | None, beta: float) -> Estimates:
        """What the batch teaches; all statistics are those of the whole batch.

        Args:
            old: fp32 [T], the trainer's log-probabilities before the update.
            values: fp32 [T], the critic's; None without one.
            beta: coefficient of the KL in the reward.
        """
        ...

    def denominator(self, totals: Totals) -> float:
        """What the sums of the loss are divided by; 0: the step has nothing to learn from."""
        ...

    def loss(self, forward: ForwardPass, part: Part, totals: Totals) -> tuple[Tensor, LossStats]:
        """The micro-batch's share of the loss of the optimizer step; the shares add up."""
        ...


class Base:
    """Answers of a method without a critic that learns from every sample of one round of sampling."""

    options: ClassVar[type[MethodOptions]]
    critic: Critic | None = None
    ptx_coefficient = 0.0
    whole_groups = False
    rounds = 1
    mask: Mask | None = None

    def __init__(self, stage: RlStage) -> None:
        self.stage = stage

    def informative(self, batch: SampleBatch) -> Tensor:
        return torch.ones(len(batch), dtype=torch.bool)

    def scores(self, batch: SampleBatch) -> Tensor:
        """fp32 [N]: the scores as the stage's options shape them."""
        stage, scores = self.stage, batch.scores
        if stage.score_clip is not None:
            parts = {name: batch.parts[name] for name in batch.standardised}
            scores = rewards.clip_parts(scores, parts, batch.standardised, stage.score_clip)
        scores = rewards.penalize_missing_eos(scores, batch.ended, stage.missing_eos_penalty, stage.missing_eos)
        return whiten(scores) if stage.whiten_scores else scores

    def outcomes(self, batch: SampleBatch, kl: Tensor, beta: float) -> Tensor:
        """fp32 [N]: score - beta * KL of the whole answer."""
        return rewards.sequence_rewards(self.scores(batch), kl, batch.lengths, beta)

    def kl_term(self, part: Part) -> KlTerm | None:
        """The KL in the loss, where the stage asks for it."""
        term = self.stage.kl_loss
        return None if term is None else KlTerm(part.ref_logprobs, term.coefficient, term.estimator, term.correction)

    def weights(self, part: Part) -> Tensor:
        """fp32 [t], truncated importance weights between engine and trainer."""
        return mismatch.truncated_importance_weights(part.old_logprobs, part.engine_logprobs, self.stage.mismatch_cap)

    def answer_weights(self, part: Part) -> Tensor:
        """fp32 [n]: those of whole answers, for a ratio that is that of the whole answer."""
        logs = segments.segment_sum(self.weights(part).log(), part.lengths)
        return logs.exp().clamp(max=self.stage.mismatch_cap)


def k1(old: Tensor, batch: SampleBatch) -> Tensor:
    """fp32 [T], the KL estimate that rewards and metrics have."""
    return kl_estimators.k1(old, batch.ref_logprobs)


METHODS: dict[str, Callable[[RlStage], Method]] = {}
"""By the name in the manifest."""


def register(options: type[MethodOptions]) -> Callable[[type[Base]], type[Base]]:
    """Makes a class the method that the manifest calls `options.name`."""

    def add(cls: type[Base]) -> type[Base]:
        cls.options = options
        METHODS[options.name] = cls  # type: ignore[assignment]
        return cls

    return add
