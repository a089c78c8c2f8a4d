"""Forward and backward passes over a batch: cut into micro-batches, shared by ranks, the result independent of both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from steersman.config.manifest import RlStage
from steersman.errors import FailedPreconditionError
from steersman.nn.packed import pack
from training.algorithms import Method
from training.algorithms.method import Estimates, LossStats, Part, Totals
from training.batch import MicroBatch, SampleBatch, micro_batches, token_chunks
from training.context import Reporter
from training.mathematics import losses, stats
from training.online.budget import micro_batch_tokens
from training.online.experience import SEEDS, step_seed
from training.online.policy_model import Forward, PolicyModel
from training.parallel import Ranks

Pair = tuple[np.ndarray, np.ndarray]
"""(prompt ids, answer ids)"""


class Passes:
    """Passes of one model over batches."""

    def __init__(
        self, stage: RlStage, method: Method, model: PolicyModel, ranks: Ranks, reporter: Reporter, seed: int
    ) -> None:
        self._stage = stage
        self._method = method
        self._model = model
        self._ranks = ranks
        self._reporter = reporter
        self._seed = seed

    @cached_property
    def _micro_tokens(self) -> int:
        return self._stage.micro_batch_tokens or micro_batch_tokens(self._model, self._ranks.world)

    def plan(self, batch: SampleBatch, step: int) -> list[list[MicroBatch]]:
        """Micro-batches of every optimizer step: epochs x minibatches, prompts shuffled anew each epoch."""
        groups = _groups(batch)
        plan = []
        for epoch in range(self._stage.epochs):
            order = groups
            if self._stage.minibatches > 1:
                generator = torch.Generator().manual_seed((step_seed(self._seed, step) * 31 + epoch) % SEEDS)
                order = [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]
            plan += [
                self._cut(batch, order[part :: self._stage.minibatches]) for part in range(self._stage.minibatches)
            ]
        return [minibatch for minibatch in plan if minibatch]

    def _cut(self, batch: SampleBatch, groups: list[int]) -> list[MicroBatch]:
        return micro_batches(batch, groups, self._micro_tokens, whole_groups=self._method.whole_groups)

    def first(self, plan: Sequence[Sequence[MicroBatch]], only_critic: bool) -> Forward | None:
        """The forward pass of a first optimizer step of one micro-batch: it serves the old values and the update."""
        if plan and len(plan[0]) == 1 and self._ranks.world == 1:
            return self._forward(plan[0][0], only_critic)
        return None

    def old(
        self, batch: SampleBatch, plan: Sequence[Sequence[MicroBatch]], made: Forward | None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and values [T] of the whole batch before the update, without a graph.

        Args:
            made: what `first` gave.

        Raises:
            FailedPreconditionError: they are not finite.
        """
        begun = list(plan[0]) if made is not None else []
        known = {group for micro in begun for group in batch.group[micro.samples].tolist()}
        whole = begun + self._cut(batch, [group for group in _groups(batch) if group not in known])
        total = int(batch.lengths.sum())
        old, values = torch.zeros(total), torch.zeros(total)
        for number, (micro, counts) in enumerate(self._ranks.share(whole)):
            forward = made if number == 0 else None
            if forward is None:
                self._reporter.activity(f"old log-probabilities {number + 1}")
                with torch.no_grad():
                    forward = self._forward(micro)
            if counts:
                old[micro.tokens] = forward.logprobs.detach().cpu()
                if forward.values is not None:
                    values[micro.tokens] = forward.values.detach().cpu()
        old, values = self._ranks.add(old), self._ranks.add(values)
        if not bool((old.isfinite() & values.isfinite()).all()):
            raise FailedPreconditionError(
                "the trainer's log-probabilities or values are not finite: the update before this step was too large; "
                "lower optimizer.learningRate and start the run again, it continues after the last checkpoint"
            )
        return old, values if self._model.value_head is not None else None

    def _forward(self, micro: MicroBatch, only_critic: bool = False) -> Forward:
        return self._model(micro.packed(self._model.device), detach_values=only_critic)

    def backward(
        self,
        batch: SampleBatch,
        estimates: Estimates,
        minibatch: Sequence[MicroBatch],
        only_critic: bool,
        made: Forward | None = None,
    ) -> LossStats:
        """Gradients of one optimizer step; the micro-batches' shares add up to its loss.

        Args:
            made: the forward pass of the only micro-batch, where it was made already.
        """
        totals = totals_of(batch, estimates, minibatch)
        parts = [LossStats(losses.PolicyStats())]
        if self._method.denominator(totals) <= 0:
            return parts[0]
        for micro, counts in self._ranks.share(minibatch):
            forward = made or self._forward(micro, only_critic)
            part = Part.of(batch, estimates, micro, forward.logprobs.device, only_critic)
            loss, found = self._method.loss(forward, part, totals)
            (loss * (self._ranks.scale if counts else 0.0)).backward()
            if counts:
                parts.append(found)
        policy = self._ranks.merge(stats.merge([part.policy for part in parts]))
        return LossStats(policy, self._ranks.merge(stats.merge([part.value for part in parts])))

    def demonstrations_backward(self, pairs: Sequence[Pair], coefficient: float, step: int, number: int) -> None:
        """PPO-ptx (InstructGPT, equation 2): adds the gradient of the language-model loss on demonstrations.

        The language model is the policy at temperature 1, whatever the sampling has.
        """
        generator = torch.Generator().manual_seed((step_seed(self._seed, step) * 17 + number) % SEEDS)
        picked = torch.randint(len(pairs), (self._stage.prompts_per_step,), generator=generator).tolist()
        drawn = [pairs[index] for index in picked]
        tokens = sum(len(answer) for _, answer in drawn)
        for chunk, counts in self._ranks.share(token_chunks(drawn, self._micro_tokens)):
            packed = pack([(prompt, [answer]) for prompt, answer in chunk], self._model.device)
            loss = losses.nll_loss(self._model.logprobs(packed, temperature=1.0), denominator=tokens)
            (loss * (coefficient * self._ranks.scale if counts else 0.0)).backward()


def totals_of(batch: SampleBatch, estimates: Estimates, minibatch: Sequence[MicroBatch]) -> Totals:
    """Counts of an optimizer step."""
    samples = torch.cat([micro.samples for micro in minibatch])
    tokens = torch.cat([micro.tokens for micro in minibatch])
    per_sample = estimates.advantages.shape == batch.lengths.shape != estimates.old_logprobs.shape
    return Totals(len(tokens), len(samples), estimates.advantages[samples if per_sample else tokens])


def _groups(batch: SampleBatch) -> list[int]:
    return sorted(set(batch.group.tolist()))
