"""What a reward model's choice is worth by a scorer that it does not know: best of n (Gao et al. 2023, section 3.1).

of N answers to a prompt, ordered by the reward, the i-th from below (1-based) is the best of a random subset of n
with probability C(i-1, n-1) / C(N, n); the mean gold score under these weights is an unbiased estimate
KL of best-of-n to the policy:  ln n - (n - 1) / n   nats
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

from steersman.report.schema import Evaluation, prompt_of
from steersman.statistics import Interval, mean_interval


class Best(NamedTuple):
    """Best of n, over prompts."""

    n: int
    kl: float
    """Nats."""
    reward: Interval
    gold: Interval


def best_of_n(evaluation: Evaluation, model: str, gold: str) -> list[Best]:
    """The curve for n = 1, 2, 4 ... up to the answers that every prompt has; empty with fewer than two of them.

    Args:
        gold: a criterion of the rubric, `total`, or `scores.NAME`.
    """
    rewards, golds = evaluation.scores(model), evaluation.scores(model, gold)
    answers: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for key, reward in rewards.items():
        if key in golds:
            answers[prompt_of(key)].append((reward, golds[key]))
    least = min(map(len, answers.values()), default=0)
    if least < 2 or len(answers) < 2:
        return []
    sizes = [*(2**power for power in range(least.bit_length()) if 2**power < least), least]
    found = []
    for n in sizes:
        chosen = [_expected(items, n) for items in answers.values()]
        means = [mean_interval([pair[column] for pair in chosen]) for column in (0, 1)]
        found.append(Best(n, math.log(n) - (n - 1) / n, *means))
    return found


def _expected(items: list[tuple[float, float]], n: int) -> tuple[float, float]:
    """Expected reward and gold of the best of n; answers of equal reward share their places."""
    ordered = sorted(items)
    subsets = math.comb(len(ordered), n)
    weights = [math.comb(place, n - 1) / subsets for place in range(len(ordered))]
    start = 0
    while start < len(ordered):
        end = next((at for at in range(start, len(ordered)) if ordered[at][0] != ordered[start][0]), len(ordered))
        mean = sum(weights[start:end]) / (end - start)
        weights[start:end] = [mean] * (end - start)
        start = end
    return (
        sum(weight * reward for weight, (reward, _) in zip(weights, ordered, strict=True)),
        sum(weight * gold for weight, (_, gold) in zip(weights, ordered, strict=True)),
    )
