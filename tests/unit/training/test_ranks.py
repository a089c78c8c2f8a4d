"""Two ranks (gloo, FSDP2 on CPU) train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks_worker import CASES, STEPS, curves

from training.parallel import Ranks


def test_two_ranks_give_the_loss_curve_of_one(tiny_model: Path, tmp_path: Path) -> None:
    """Every algorithm, all weights or an adapter: losses, norms and weights agree to 1e-4 over ten steps."""
    worker = Path(__file__).with_name("ranks_worker.py")
    out = tmp_path / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(worker), str(tiny_model), str(out)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(out.read_text())
    one = curves(tiny_model, tmp_path, Ranks())
    assert set(two) == set(CASES)
    for name in CASES:
        assert len(one[name]) == STEPS + 1
        moved = abs(one[name][0]["policy_loss"] - one[name][-2]["policy_loss"])
        assert moved > 1e-3, name  # the curve is no straight line that any number of ranks would draw
        for step, (expected, found) in enumerate(zip(one[name], two[name], strict=True), start=1):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), (name, step)
