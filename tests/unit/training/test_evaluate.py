"""What an evaluation says of one answer."""

from __future__ import annotations

import numpy as np

from benchmarks import gates
from steersman.rewards import build_reward
from training.evaluate import rubric_of
from training.online.rollout import Prompt


def test_every_check_is_reported() -> None:
    """The first one gives the total and its criteria; one without criteria stands under its own name."""
    row = Prompt(np.zeros(1, np.int32), [{"role": "user", "content": "When?"}], '{"needed": ["Monday"]}')
    rubric = build_reward("demo-rubric", {})
    polite = build_reward("regex", {"pattern": "Thank"})
    said = "Thank you. It comes on Monday."
    both = rubric_of(row, said, {"demo-rubric": rubric, "regex": polite})
    assert both == {**rubric(row.messages, said, {"needed": ["Monday"]}).criteria, "regex": 1.0}
    assert {"total", "grounded", "polite"} < set(both)
    assert rubric_of(row, "Monday.", {"regex": polite, "demo-rubric": rubric})["total"] == 0.0
    assert rubric_of(row, said, {"regex": polite}) == {"total": 1.0, "regex": 1.0}
    assert rubric_of(row, said, {}) == {}


def test_the_gates_let_no_more_pass_wrongly_than_they_say() -> None:
    """The simulation of `make bench-gates`, small: several answers to each prompt, a later model that is no better."""
    found = gates.simulate(simulations=200, prompts=24, samples=8)
    assert found["false_pass"] < 0.07
    assert found["independent_false_pass"] > 0.12
    assert found["coverage"] > 0.9


def test_training_prompts_are_not_called_held_out() -> None:
    made = gates.evaluation(np.zeros((2, 2)), np.ones((2, 2)))
    assert made.kind == "held-out prompts"
    assert made.prompts == 2
    assert made.model_copy(update={"heldout": False}).kind == "training prompts"
