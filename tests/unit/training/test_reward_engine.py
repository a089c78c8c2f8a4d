"""What one scorer gets wrong stays with that scorer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.reward.config import RewardConfig
from services.reward.engine import Item, Part, RewardEngine
from steersman.v1 import reward_pb2

ITEMS = [Item([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [], "", {})] * 2


class Scripted:
    def __init__(self, name: str, weight: float, answer: Any) -> None:
        self.info = reward_pb2.ScorerInfo(name=name, kind="verifiable", weight=weight)
        self.answer = answer

    def score(self, items: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return [Part(value) for value in self.answer]


def score(*scorers: Scripted) -> list[reward_pb2.ItemScore]:
    engine = RewardEngine(RewardConfig(scorers=[{"name": "regex", "kind": "verifiable", "options": {"pattern": "a"}}]))
    engine.scorers = list(scorers)
    return engine.score(list(ITEMS))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([math.nan, 1.0], "odd: gave nan, which is no finite number"),
        ([math.inf, 1.0], "odd: gave inf, which is no finite number"),
        (["3", 1.0], "odd: gave '3', which is no finite number"),
    ],
)
def test_one_answer_without_a_value_leaves_the_others_alone(answer: Any, error: str) -> None:
    first, second = score(Scripted("good", 1.0, [2.0, 2.0]), Scripted("odd", 0.5, answer))
    assert not first.HasField("reward")
    assert first.error == error
    assert first.parts[0].value == 2.0
    assert second.reward == 2.5


def test_a_scorer_of_weight_0_voids_nothing() -> None:
    for answer in ([math.nan, 1.0], RuntimeError("away"), [1.0]):
        first, _ = score(Scripted("good", 1.0, [2.0, 3.0]), Scripted("watched", 0.0, answer))
        assert first.reward == 2.0
        assert not first.error


def test_none_is_no_reward_and_never_0() -> None:
    """A function that has nothing to say of an answer leaves it to the others; alone, there is no reward."""
    first, second = score(Scripted("odd", 0.5, [None, 1.0]))
    assert not first.HasField("reward")
    assert first.error == "odd: no reward for this answer (None)"
    assert second.reward == 0.5


@pytest.mark.parametrize(
    ("answer", "error"),
    [([1.0], "odd: gave 1 values for 2 answers"), (RuntimeError("no connection"), "odd: no connection")],
)
def test_a_scorer_that_fails_as_a_whole_is_named(answer: Any, error: str) -> None:
    for item in score(Scripted("good", 1.0, [2.0, 3.0]), Scripted("odd", 1.0, answer)):
        assert not item.HasField("reward")
        assert item.error == error
