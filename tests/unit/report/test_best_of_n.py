"""Best of n against a gold scorer, counted over every subset."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from steersman.report.best_of_n import best_of_n
from steersman.report.schema import Evaluation, Message, Sample

REWARDS = {"a": [0.1, 0.9, 0.5, 0.7], "b": [2.0, 1.0, 3.0, 0.0], "c": [1.0, 1.0, 0.0, 2.0]}
GOLD = {"a": [0.0, 0.2, 1.0, 0.4], "b": [0.3, 0.6, 0.1, 0.9], "c": [0.0, 1.0, 0.5, 0.2]}


def evaluation(count: int = 4) -> Evaluation:
    samples = tuple(
        Sample(
            prompt_id=f"{name}#{n}", prompt=(Message(role="user", content=name),), answer=str(n), reward=reward,
            rubric={"total": GOLD[name][n]}, length=1, finish_reason="stop",
        )
        for name, rewards in REWARDS.items()
        for n, reward in enumerate(rewards[:count])
    )  # fmt: skip
    return Evaluation(name="run", seed=1, models={"base": samples})


def test_the_estimate_is_the_mean_over_every_subset() -> None:
    curve = best_of_n(evaluation(), "base", "total")
    assert [best.n for best in curve] == [1, 2, 4]
    for best in curve:
        expected = []
        for name, rewards in REWARDS.items():
            subsets = list(combinations(range(4), best.n))
            golds = []
            for subset in subsets:
                top = max(rewards[n] for n in subset)
                ties = [GOLD[name][n] for n in subset if rewards[n] == top]
                golds.append(sum(ties) / len(ties))
            expected.append(sum(golds) / len(subsets))
        assert best.gold.estimate == pytest.approx(sum(expected) / 3)
        assert best.kl == pytest.approx(math.log(best.n) - (best.n - 1) / best.n)


def test_one_answer_a_prompt_gives_no_curve() -> None:
    assert best_of_n(evaluation(1), "base", "total") == []
