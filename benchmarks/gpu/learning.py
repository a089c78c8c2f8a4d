"""PPO on a task with a known optimum: an answer with a lower-case letter is rewarded, so the best reward is 1."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.setup import Setup
from benchmarks.processes import alignment_run

ROOT = Path(__file__).parents[2]
BEST = 1.0
NEAR = 0.9
STAGE: dict[str, Any] = {
    "algorithm": "ppo",
    "ppo": {"critic": {"kind": "valueHead", "learningRate": 0.02}},
    "promptsPerStep": 8,
    "samplesPerPrompt": 4,
    "generation": {"maxNewTokens": 2},
    "klCoefficient": 0.0,
    "missingEosPenalty": 0.0,
    "optimizer": {"learningRate": 0.01},
    "lora": None,
}


def run(setup: Setup) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    from live_services import Cluster, LoopThread

    from steersman.config.base import dump_yaml, load_model
    from steersman.config.manifest import AlignmentRun
    from steersman.testing.models import save_model_folder, tiny_llama
    from training.stage import run_stage

    steps = 2 if setup.quick else 40
    cluster = Cluster(LoopThread())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = save_model_folder(folder / "model", tiny_llama())
        rows = [{"id": f"p{n}", "prompt": [{"role": "user", "content": f"p{n}"}]} for n in range(8)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            cluster.start_policy(model, device=setup.device)
            cluster.start_reference(model, device=setup.device)
            cluster.start_reward([{"name": "regex", "kind": "verifiable", "options": {"pattern": "[a-z]"}}])
            spec = {
                "seed": 3,
                "model": {"base": str(model), "precision": "fp32", "device": setup.device, "threads": 1},
                "data": {"prompts": {"train": "prompts.jsonl"}},
                "services": cluster.services(),
                "stages": [{"rl": {**STAGE, "steps": steps}}],
            }
            run = load_model(AlignmentRun, alignment_run("learning", spec), "learning")
            (folder / "manifest.yaml").write_text(dump_yaml(run))
            run_stage(folder, "rl", [])
            found = [json.loads(line) for line in (folder / "rl" / "metrics.jsonl").read_text().splitlines()]
        finally:
            cluster.close()
    rewards = [step["reward"] for step in found]
    return {
        "rewards": rewards,
        "first": rewards[0],
        "last": judged(rewards, whole=not setup.quick),
        "best": BEST,
        "mismatch_mean_abs": max(step["mismatch_mean_abs"] for step in found),
    }


def judged(rewards: Sequence[float], *, whole: bool) -> float:
    """Mean of the last rewards; RuntimeError where a whole run ends far from the best one."""
    reached = sum(rewards[-5:]) / len(rewards[-5:])
    if whole and reached < NEAR:
        raise RuntimeError(f"PPO reached a reward of {reached:.2f}, the best is {BEST:.0f}")
    return reached


def rows(report: dict[str, Any]) -> Sequence[Sequence[object]]:
    return [
        ("PPO to the optimum", f"reward {report['first']:.2f} -> {report['last']:.2f}", f"best {report['best']:.0f}",
         f"mismatch {report['mismatch_mean_abs']:.1e}")
    ]  # fmt: skip
