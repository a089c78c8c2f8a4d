"""Count, sum and sum of squares: statistics that add up over micro-batches, steps and ranks; whitening with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of a set of numbers, kept as sums in double precision so that parts of the set can be added.

    `a + b` describes the union. Over ranks: all-reduce `torch.tensor(dataclasses.astuple(m), dtype=torch.float64)` by
    sum, and build Moments from the three numbers.
    """

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @staticmethod
    def of(values: Tensor) -> Moments:
        """Moments of all elements of `values` (any shape); NaN elements are missing and not counted."""
        present = values.detach().double()
        present = present[~present.isnan()]
        sums = torch.stack([present.sum(), present.square().sum()])
        return Moments(float(present.numel()), *sums.tolist())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """Mean, 0 for an empty set."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """Population variance (divided by count, as tf.nn.moments in lm-human-preferences), 0 for an empty set."""
        return max(self.squares / self.count - self.mean**2, 0.0) if self.count else 0.0

    @property
    def std(self) -> float:
        """Square root of the population variance."""
        return math.sqrt(self.variance)


def whiten(values: Tensor, moments: Moments | None = None, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Same shape: (x - mean) / sqrt(variance + eps); with `shift_mean=False` the mean is added back.

    `moments` are those of the GLOBAL batch, so that the result does not depend on the micro-batch or the rank;
    None takes those of `values`. Source: `whiten` in lm-human-preferences utils/core.py, which uses `shift_mean=False`
    for rewards and True for advantages.
    """
    moments = Moments.of(values) if moments is None else moments
    whitened = (values - moments.mean) / math.sqrt(moments.variance + eps)
    return whitened if shift_mean else whitened + moments.mean
