"""The RL loop against real services: every algorithm must find the answer that is rewarded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_endpoint import judging
from safetensors.torch import load_file

from steersman.config.algorithms import ONLINE_METHODS
from steersman.errors import FailedPreconditionError
from steersman.report.overoptimisation import read_looks

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
    "checkpointEvery": 20,
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


# Gold wants the opposite of what is rewarded: the plainest reward hack.
FEARS_LETTERS = {
    "name": "gold",
    "type": "regex",
    "kind": "verifiable",
    "weight": 0.0,
    "options": {"pattern": "^[^a-z]*$"},
}


def test_a_scorer_that_training_never_uses_sounds_the_alarm_and_the_better_checkpoint_is_taken(
    cluster: Any, tiny_model: Path, run_manifest: Callable
) -> None:
    cluster.start_policy(tiny_model)
    cluster.start_reference(tiny_model)
    cluster.start_reward([*LIKES_LETTERS, FEARS_LETTERS])
    watch = {"every": 10, "prompts": 24, "samplesPerPrompt": 2, "onAlarm": "stop"}
    stage = run_manifest(
        cluster,
        tiny_model,
        {"rl": {**BANDIT, "algorithm": "rloo", "watch": watch}},
        prompts=[f"p{number}" for number in range(24)],
    )
    looks = read_looks(stage / "watch.jsonl")
    rows = metrics(stage)
    assert len(rows) < 40, "the alarm ends the training"
    assert rows[-1]["watch_alarm"] == 1.0
    assert looks[0].step == 0
    assert looks[-1].mean() > looks[0].mean()
    assert looks[-1].mean("gold") < looks[0].mean("gold")
    assert looks[0].kl == pytest.approx(0.0, abs=1e-3)
    assert looks[-1].kl > 0.1
    # The recommended checkpoint is the one before training: the stage's model is the one it began with.
    before, after = (load_file(next(folder.glob("*.safetensors"))) for folder in (tiny_model, stage / "model"))
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_an_llm_judge_that_disagrees_with_people_has_no_licence_to_reward(
    cluster: Any, tiny_model: Path, run_manifest: Callable, tmp_path: Path
) -> None:
    def row(number: int) -> dict[str, Any]:
        said = {"chosen": "no", "rejected": f"a longer answer {number}"}
        answers = {side: [{"role": "assistant", "content": text}] for side, text in said.items()}
        return {"prompt": [{"role": "user", "content": f"q{number}"}], "soft_label": 0.9, **answers}

    (tmp_path / "run").mkdir()
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(12))
    (tmp_path / "run" / "judged.jsonl").write_text(lines)
    with judging() as endpoint:  # likes length, which these people do not
        options = {"url": endpoint.url, "model": "m", "rubric": "Be good."}
        judge = {"name": "llm", "type": "judge", "options": options}
        cluster.start_policy(tiny_model)
        cluster.start_reference(tiny_model)
        cluster.start_reward([{"kind": "verifiable", **judge}])
        with pytest.raises(FailedPreconditionError, match=r"llm has no licence to reward: it shares 0\.0%.* in 90\.0%"):
            run_manifest(
                cluster,
                tiny_model,
                {"rl": {**BANDIT, "algorithm": "rloo", "reward": {"verifiable": [judge]}}},
                prompts=PROMPTS,
                data={
                    "prompts": {"train": "prompts.jsonl"},
                    "preferences": {"train": "judged.jsonl", "heldout": "judged.jsonl"},
                },
                licence={"without": "refuse"},
            )
    assert len(endpoint.asked) == 24, "both answers of every row"
