"""What an evaluation says of one answer."""

from __future__ import annotations

import numpy as np

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
