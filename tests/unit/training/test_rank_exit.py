"""The exit code of a failed rank reaches the Job."""

from __future__ import annotations

from pathlib import Path

import pytest
from loaded import Loaded

from steersman.local.process import free_ports

pytestmark = pytest.mark.timeout(600)


# torchrun makes one dollar of two.
@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -9 $$$$", 137)])
def test_the_code_of_the_rank_is_the_code_of_the_launcher(command, code, tmp_path: Path, loaded: Loaded):
    launch = ["--one-machine", "--nproc-per-node=1", "--max-restarts=0", "--no-python", "sh", "-c", command]
    done = loaded.run(*launch, module="training.ranks", cwd=tmp_path)
    assert done.returncode == code, done.stderr[-500:]


MEET = """
import os, time
from pathlib import Path
import psutil
import torch
import torch.distributed as dist
from training import RANKS_FILE
from training.parallel import meet

meet("cpu")
total = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(total)
assert total.item() == 3
assert Path(os.environ[RANKS_FILE]).parent.stat().st_mode & 0o077 == 0
me = [psutil.Process(), psutil.Process(os.getppid())]
open_to = {c.laddr.ip for process in me for c in process.connections("all") if c.status == "LISTEN" and c.laddr}
assert open_to <= {"127.0.0.1", "::1"}, open_to
dist.barrier()
"""


def test_ranks_of_one_machine_meet_without_a_port_that_others_reach(tmp_path: Path, loaded: Loaded):
    """Neither the launcher nor a rank listens on an address that another machine reaches."""
    (tmp_path / "meet.py").write_text(MEET)
    launch = ["--one-machine", "--nproc-per-node=2", "--max-restarts=0", str(tmp_path / "meet.py")]
    done = loaded.run(*launch, module="training.ranks", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_workers_of_several_machines_meet_by_a_store_that_unpickles_nothing(tmp_path: Path, loaded: Loaded):
    """As the controller starts them; here both on this machine."""
    (tmp_path / "meet.py").write_text(MEET.partition("assert Path")[0])
    port = free_ports(1)[0]
    common = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=static", "--rdzv-conf=timeout=60"]
    common += [f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=a-run", "--max-restarts=0"]
    ranks = [
        loaded.start(*common, f"--node-rank={rank}", str(tmp_path / "meet.py"), module="training.ranks", cwd=tmp_path)
        for rank in range(2)
    ]
    for rank in ranks:
        _, said = rank.communicate()
        assert rank.wait() == 0, said[-2000:]
