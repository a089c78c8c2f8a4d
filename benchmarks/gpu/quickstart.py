"""The quickstart, SFT to evaluation, through `steersman run` with its services, on a random 135M model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.setup import Setup

EXAMPLE = Path(__file__).parents[2] / "examples" / "01-quickstart" / "run.yaml"
_QUICK = [
    "spec.stages.0.sft.maxSteps=2",
    "spec.stages.1.rewardModel.maxSteps=2",
    "spec.stages.2.rl.steps=2",
    "spec.stages.2.rl.generation.maxNewTokens=4",
    "spec.stages.3.evaluate.generation.maxNewTokens=4",
    "spec.stages.3.evaluate.maxPrompts=4",
    "spec.data.demo={demonstrations: 16, preferences: 16, prompts: 16}",
]


def run(setup: Setup) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        base = setup.folder("135M", Path(scratch) / "base")
        run_dir = Path(scratch) / "run"
        settings = [f"spec.model.base={base}", f"spec.model.device={setup.device}"]
        settings += _QUICK if setup.quick else []
        command = [sys.executable, "-m", "steersman", "run", "-f", str(EXAMPLE), "--run-dir", str(run_dir)]
        for one in settings:
            command += ["--set", one]
        done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr, check=False)
        if done.returncode:
            for log in sorted(run_dir.glob("**/*.log")):
                print(f"-- {log.name}\n{log.read_text()[-1500:]}", file=sys.stderr)
            raise RuntimeError(f"steersman run ended with {done.returncode}")
        usage = json.loads((run_dir / "usage.json").read_text())
        steps = [json.loads(line) for line in (run_dir / "rl" / "metrics.jsonl").read_text().splitlines()]
        prepared = json.loads((run_dir / "prepared.json").read_text())
    return {
        "device": prepared["device"],
        "precision": prepared["precision"],
        "usage": usage,
        "rl_steps": len(steps),
        "mismatch_mean_abs": max(step["mismatch_mean_abs"] for step in steps),
        "step_seconds": {
            name: sum(step[name] for step in steps[1:]) / max(1, len(steps) - 1)
            for name in steps[-1]
            if name.endswith("seconds")
        },
        "last_step": steps[-1],
    }


def rows(report: dict[str, Any]) -> Sequence[Sequence[object]]:
    seconds = report["usage"].get("seconds", {})
    return [
        ("quickstart 135M, services and all", f"{sum(seconds.values()):.0f} s",
         ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
         f"mismatch {report['mismatch_mean_abs']:.3f}")
    ]  # fmt: skip
