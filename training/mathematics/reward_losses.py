"""Losses of reward models. As in `losses.py` each takes the GLOBAL count as `denominator` and returns sum / count.

N counts samples, P pairs, A aspects. Rewards and predictions are the raw outputs of the model, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import InvalidArgumentError
from training.mathematics.losses import divide
from training.mathematics.stats import sum_of, to_floats


@dataclass(frozen=True)
class RewardStats:
    """Sums over `count` pairs or samples (aspect values for `aspect_loss`); merge with `stats.merge`.

    correct: pairs in the right order or samples on the right side of 0, a tie counts one half. reward: chosen minus
    rejected for pairs, else the prediction.
    """

    count: float = 0.0
    loss: float = 0.0
    correct: float = 0.0
    reward: float = 0.0

    def means(self) -> dict[str, float]:
        """Means by metric name."""
        count = max(self.count, 1.0)
        return {"loss": self.loss / count, "accuracy": self.correct / count, "reward": self.reward / count}


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    denominator: float,
    margin: Tensor | None = None,
    centering: float = 0.0,
    soft_label: Tensor | None = None,
) -> tuple[Tensor, RewardStats]:
    """Bradley-Terry ranking loss (Llama 2, eq. 1; with `margin`, eq. 2), summed over pairs / global pairs.

        -log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2

    With `soft_label` s [P], the share of people who preferred `chosen`, the first term is s times that of the pair plus
    1 - s times that of the pair turned around; at 1/2, a tie, equal rewards are best.

    chosen, rejected and margin are fp32 [P]. Llama 2's margin grows with the annotator's rating, such as 3, 2, 1, 0
    from "significantly" to "negligibly better". The second term keeps rewards around 0 (Eisenstein et al. 2023, eq. 2;
    TRL's `center_rewards_coefficient`, 0.01 recommended there).
    """
    difference = chosen - rejected
    needed = 0.0 if margin is None else margin
    terms = -F.logsigmoid(difference - needed)
    if soft_label is not None:
        terms = soft_label * terms - (1 - soft_label) * F.logsigmoid(-difference - needed)
    if centering:
        terms = terms + centering * (chosen + rejected).square()
    sums = to_floats(sum_of(terms), sum_of(_heaviside(difference)), sum_of(difference))
    return divide(terms, denominator), RewardStats(float(chosen.numel()), *sums)


def binary_loss(logits: Tensor, preferred: Tensor, *, denominator: float) -> tuple[Tensor, RewardStats]:
    """Binary cross-entropy on logits fp32 [N] / global samples.

    `preferred` [N] is True where an answer is preferred, or the share of people who did.
    """
    share = preferred.to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits, share, reduction="none")
    sign = torch.sign(share - 0.5)
    sums = to_floats(sum_of(terms), sum_of(_heaviside(sign * logits)), sum_of(logits))
    return divide(terms, denominator), RewardStats(float(logits.numel()), *sums)


def aspect_loss(predictions: Tensor, targets: Tensor, *, denominator: float) -> tuple[Tensor, RewardStats]:
    """Squared error of several aspects (as HelpSteer, Wang et al. 2023), summed over the values that exist.

    predictions and targets are fp32 [N, A]; NaN in targets is an aspect that nobody rated, which adds neither loss nor
    gradient. `denominator` is the global number of values that exist (`int((~targets.isnan()).sum())` added up).
    """
    if predictions.shape != targets.shape:
        raise InvalidArgumentError(f"predictions {list(predictions.shape)} and targets {list(targets.shape)} differ")
    exists = ~targets.isnan()
    # Select before subtracting: NaN times a zero mask would still be a NaN gradient.
    predicted, target = predictions[exists], targets[exists]
    terms = (predicted - target).square()
    loss, reward = to_floats(sum_of(terms), sum_of(predicted))
    return divide(terms, denominator), RewardStats(float(predicted.numel()), loss, 0.0, reward)


def _heaviside(values: Tensor) -> Tensor:
    return torch.heaviside(values.detach(), values.new_tensor(0.5))
