"""The learning rate over a stage, the same for every stage."""

from __future__ import annotations

import math

from steersman.config.manifest import Optimizer


def factor_of_step(options: Optimizer, step: int, steps: int) -> float:
    """Factor of the peak rate for one of `steps` optimizer steps, counted from 0; never 0.

    A step takes the rate at its middle, so that the first one of a warm-up and the last one of a decay move weights.
    """
    return learning_rate_factor(options, (min(step, steps - 1) + 0.5) / steps)


def learning_rate_factor(options: Optimizer, progress: float) -> float:
    """Factor of the peak rate after a share of the stage: linear warm-up, then constant, linear or cosine decay."""
    if progress < options.warmup_ratio:
        return progress / options.warmup_ratio
    decayed = (progress - options.warmup_ratio) / (1.0 - options.warmup_ratio) if options.warmup_ratio < 1.0 else 0.0
    if options.schedule == "linear":
        return 1.0 - decayed
    if options.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * decayed))
    return 1.0
