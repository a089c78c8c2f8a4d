"""The RL loop against real services: every algorithm must find the answer that is rewarded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steersman.config.algorithms import ONLINE_METHODS

PROMPTS = [f"p{number}" for number in range(8)]
# An answer with a lower-case letter is rewarded: about one in six of a random model's, all of the best policy's.
LIKES_LETTERS = [{"name": "regex", "kind": "verifiable", "options": {"pattern": "[a-z]"}}]

BANDIT: dict[str, Any] = {
    "steps": 40,
    "promptsPerStep": 8,
    "samplesPerPrompt": 4,
    "generation": {"maxNewTokens": 2},
    "klCoefficient": 0.0,
    "missingEosPenalty": 0.0,
    "optimizer": {"learningRate": 0.01},
    "lora": None,
}


def metrics(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ONLINE_METHODS)
def test_learns_the_rewarded_token(algorithm: str, cluster: Any, tiny_model: Path, run_manifest: Callable) -> None:
    cluster.start_policy(tiny_model)
    cluster.start_reference(tiny_model)
    cluster.start_reward(LIKES_LETTERS)
    options = {"ppo": {"critic": {"kind": "valueHead", "learningRate": 0.02}}} if algorithm == "ppo" else {}
    if algorithm == "nlpo":  # at first a set must hold a letter, and the set of a policy that has learned only letters
        options = {"nlpo": {"critic": {"kind": "valueHead", "learningRate": 0.02}, "topP": 0.9, "refreshEvery": 5}}
    if algorithm == "gspo":  # its published range is for a policy of which each answer moves a thousandth
        options = {"gspo": {"clipLow": 0.2, "clipHigh": 0.2}}
    stage = run_manifest(cluster, tiny_model, {"rl": {**BANDIT, "algorithm": algorithm, **options}}, prompts=PROMPTS)
    rows = metrics(stage)
    assert rows[0]["reward"] < 0.4
    assert sum(row["reward"] for row in rows[-5:]) / 5 > 0.9
    assert max(row["mismatch_mean_abs"] for row in rows) < 1e-4
