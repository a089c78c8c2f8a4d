"""Somebody's own reward function through `steersman run`, with real services."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from steersman.testing.models import save_model_folder, tiny_llama

STEERSMAN = str(Path(sys.executable).with_name("steersman"))
FUNCTION = '''
def likes_even(prompts, completions, number, **kwargs):
    """Nothing is said of odd rows; `number` is a key of the rows."""
    assert len(prompts) == len(completions) == len(number)
    return [None if n % 2 else float(len(c[0]["content"])) for c, n in zip(completions, number)]
'''

pytestmark = pytest.mark.timeout(600)


def write(folder: Path, function: str = "likes_even") -> None:
    save_model_folder(folder / "base", tiny_llama())
    (folder / "mine.py").write_text(FUNCTION)
    rows = [{"prompt": [{"role": "user", "content": f"Question {n}"}], "number": n} for n in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rl = {
        "algorithm": "rloo",
        "steps": 1,
        "promptsPerStep": 4,
        "samplesPerPrompt": 2,
        "maxFailedShare": 0.9,
        "generation": {"maxNewTokens": 8},
        "reward": {"verifiable": [{"python": f"mine:{function}"}]},
    }
    manifest = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "own"},
        "spec": {
            "model": {"base": "base", "precision": "fp32", "threads": 1},
            "data": {"prompts": {"train": "prompts.jsonl"}},
            "stages": [{"rl": rl}],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(manifest))


def steersman(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [STEERSMAN, "run", "-f", str(folder / "run.yaml"), "--run-dir", str(folder / "run")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_function_beside_the_manifest_rewards_and_what_it_says_nothing_of_is_left_out(tmp_path: Path) -> None:
    write(tmp_path)
    done = steersman(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "run/rl/metrics.jsonl").read_text().splitlines()]
    assert row["failed"] == 4  # both samples of the two odd rows
    assert row["reward_likes_even"] == row["reward"] >= 0


def test_a_function_that_is_not_there_is_found_before_anything_starts(tmp_path: Path) -> None:
    write(tmp_path, function="likes_odd")
    done = steersman(tmp_path)
    assert done.returncode == 2
    (sentence,) = done.stderr.strip().splitlines()
    assert "stage rl: reward.verifiable: python:" in sentence
    assert "mine.py has no function likes_odd" in sentence
    assert not (tmp_path / "run" / "services").exists()
