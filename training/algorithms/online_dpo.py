"""Online DPO (Guo et al. 2024, arXiv 2402.04792): preferences that the reward states about the policy's own answers.

    of the answers to a prompt the best is chosen, the worst rejected
    L = mean over prompts of -log sigmoid(beta (log pi/pi_ref (chosen) - log pi/pi_ref (rejected)))

A prompt whose answers all have one score says nothing and is left out. The reference is in the loss, so no KL is in the
reward. TRL compares two answers; more give a clearer pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.config.algorithms import OnlineDpoSpec
from training.algorithms.method import Base, Estimates, ForwardPass, LossStats, Part, Totals, k1, register
from training.batch import SampleBatch
from training.mathematics import losses, segments
from training.mathematics.stats import max_of, sum_of, to_floats


@register(OnlineDpoSpec)
class OnlineDpo(Base):
    whole_groups = True

    def estimate(self, batch: SampleBatch, old: Tensor, values: Tensor | None, beta: float) -> Estimates:
        return Estimates(old, k1(old, batch), chosen_and_rejected(self.scores(batch), batch.group))

    def denominator(self, totals: Totals) -> float:
        return float((totals.advantages > 0).sum())

    def loss(self, forward: ForwardPass, part: Part, totals: Totals) -> tuple[Tensor, LossStats]:
        options = self.stage.options
        assert isinstance(options, OnlineDpoSpec)
        log_ratio = segments.segment_sum(forward.logprobs - part.ref_logprobs, part.lengths)
        order = part.group.argsort(stable=True)  # the pairs of a prompt stand at the same place in both
        choice = part.advantages[order]
        chosen, rejected = log_ratio[order][choice > 0], log_ratio[order][choice < 0]
        loss = losses.online_preference_loss(
            chosen, rejected, denominator=self.denominator(totals), beta=options.beta, kind=options.loss
        )
        drift = forward.logprobs - part.old_logprobs
        ratio = drift.exp()
        total, ratios, moved, highest = to_floats(
            loss * self.denominator(totals), sum_of(ratio), sum_of(0.5 * drift.square()), max_of(ratio)
        )
        tokens = float(drift.numel())
        return loss, LossStats(losses.PolicyStats(tokens, tokens, total, 0.0, moved, ratios, highest))


def chosen_and_rejected(scores: Tensor, group: Tensor) -> Tensor:
    """fp32 [N]: 1 for the best and -1 for the worst sample of each group, 0 for the others and where all are equal."""
    choice = torch.zeros_like(scores)
    for number in group.unique().tolist():
        members = (group == number).nonzero()[:, 0]
        best, worst = members[scores[members].argmax()], members[scores[members].argmin()]
        if scores[best] > scores[worst]:
            choice[best], choice[worst] = 1.0, -1.0
    return choice
