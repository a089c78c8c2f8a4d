"""A little of `make fuzz` on everything that reads."""

from __future__ import annotations

import pytest
from fuzz.__main__ import round_of
from fuzz.targets import Target, targets


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_hostile_input_gives_an_answer_or_a_sentence(target: Target) -> None:
    round_of(target, 1, number=7)  # loads what is imported late
    tried, problem = round_of(target, 120, number=7)
    assert problem is None, problem
    assert tried >= 50
