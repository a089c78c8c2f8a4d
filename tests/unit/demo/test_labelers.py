"""Votes, margins and agreement of the simulated labelers."""

from random import Random

import pytest

from steersman.demo.labelers import LABELERS, agreement, majority
from steersman.demo.rubric import RubricScore


def rubric(total: float) -> RubricScore:
    return RubricScore(grounded=total, answers=total, polite=total, concise=total, no_invented=total, total=total)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["a"] * 5, ("a", 1.0, "significantly better")),
        (["b", "b", "b", "b", "tie"], ("b", 0.6667, "better")),
        (["a", "a", "a", "a", "b"], ("a", 0.6667, "better")),
        (["b", "b", "tie", "tie", "a"], ("b", 0.0, "negligibly better")),
        (["a", "a", "a", "b", "tie"], ("a", 0.3333, "slightly better")),
        (["a", "a", "b", "b", "tie"], ("tie", 0.0, "tie")),
        (["a", "a", "tie", "tie", "tie"], ("tie", 0.0, "tie")),
    ],
)
def test_majority_and_margin(votes: list[str], expected: tuple[str, float, str]) -> None:
    assert majority(votes) == expected


def test_clear_cases_are_judged_alike_and_equal_answers_often_tie() -> None:
    rng = Random(0)
    clear = [labeler.compare(rng, rubric(1.0), rubric(0.1)) for labeler in LABELERS for _ in range(40)]
    equal = [labeler.compare(rng, rubric(0.8), rubric(0.8)) for labeler in LABELERS for _ in range(200)]
    assert clear.count("a") / len(clear) > 0.98
    assert 0.2 < equal.count("tie") / len(equal) < 0.7
    assert abs(equal.count("a") - equal.count("b")) < 0.1 * len(equal)


def test_fleiss_kappa_of_a_hand_worked_table() -> None:
    # Three items, four raters: P = (1 + 1/3 + 1/2) / 3, shares a 6/12, b 3/12, tie 3/12.
    rows = [["a"] * 4, ["a", "a", "b", "b"], ["b", "tie", "tie", "tie"]]
    observed = (1 + 1 / 3 + 1 / 2) / 3
    expected = (6 / 12) ** 2 + (3 / 12) ** 2 + (3 / 12) ** 2
    assert agreement(rows) == {
        "pairwise": pytest.approx(observed, abs=1e-4),
        "fleiss_kappa": pytest.approx((observed - expected) / (1 - expected), abs=1e-4),
    }
