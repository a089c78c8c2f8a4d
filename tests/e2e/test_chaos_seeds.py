"""A few seeds of `make chaos` on both families."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loaded import Loaded

pytestmark = pytest.mark.timeout(900)


# A scorer that says too little, artifacts away and a stop; of the gateways a kill. These seeds draw the same whatever
# the machine may do (mounts, clocks, PostgreSQL). No seed with a flipped bit: that is open.
@pytest.mark.parametrize(("family", "shape", "first", "count"), [("run", "ppo", 21, 1), ("gateway", "sqlite", 34, 1)])
def test_a_few_seeds(
    family: str, shape: str, first: int, count: int, repo_root: Path, tmp_path: Path, loaded: Loaded
) -> None:
    command = ["--family", family, "--shape", shape, "--first", str(first)]
    command += ["--schedules", str(count), "--out", str(tmp_path / "chaos.json")]
    environment = {name: value for name, value in os.environ.items() if name != "CHAOS_SEED"}
    done = loaded.run(*command, module="chaos", cwd=repo_root, environment=environment)
    assert done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"schedules", "equal", "stopped_clearly", "bad"}
    assert found["bad"] == [], done.stdout[-4000:]
    assert found["schedules"] == found["equal"] + found["stopped_clearly"] == count


def test_a_slow_disk_is_slow_below_its_folder_only(tmp_path: Path) -> None:
    from chaos.forking import Disk, make_disk

    for name in ("slow", "usual"):
        (tmp_path / name).mkdir()
    environment = make_disk(tmp_path)
    if environment is None:
        pytest.skip("a C compiler is not there")
    disk, script = Disk(tmp_path / "disk"), tmp_path / "writes.py"
    script.write_text(
        "import os, sys, time\nbegan = time.monotonic()\nwith open(sys.argv[1], 'wb') as file:\n"
        "    file.write(b'x')\n    file.flush()\n    os.fsync(file.fileno())\nprint(time.monotonic() - began)\n"
    )

    def seconds(folder: str) -> float:
        command = [sys.executable, str(script), str(tmp_path / folder / "file")]
        return float(subprocess.run(command, env=os.environ | environment, capture_output=True, check=True).stdout)

    disk.slow(tmp_path / "slow", 400)
    assert seconds("slow") >= 0.45, "of a sync, and an eighth of it for the write"
    disk.slow(tmp_path / "slow", 3_600_000)
    assert seconds("usual") < 3600
    disk.usual()
    assert seconds("slow") < 3600


def test_a_schedule_follows_from_its_seed() -> None:
    from chaos.gateways import plan_of as gateway_plan
    from chaos.runs import plan_of as run_plan

    for seed in range(50):
        assert run_plan(seed, mounts=True, jumps=True) == run_plan(seed, mounts=True, jumps=True)
        again = gateway_plan(seed, mounts=True, postgres=True)
        assert again == gateway_plan(seed, mounts=True, postgres=True)
    names = {name for seed in range(400) for name in run_plan(seed, mounts=True, jumps=True).names()}
    new = {name for seed in range(10_000, 10_200) for name in run_plan(seed, mounts=True, jumps=True).names()}
    new |= {name for seed in range(10_000, 10_200) for name in gateway_plan(seed, mounts=True, postgres=True).names()}
    assert "slow disk" in new - names, "old seeds draw what they drew"
    assert {"full disk", "stale replica", "two runs", "manifest edited", "clock jumps", "few handles"} <= names
