"""The exit code of a failed rank reaches the Job."""

from __future__ import annotations

import subprocess
import sys

import pytest


# torchrun makes one dollar of two.
@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -9 $$$$", 137), ("true", 0)])
def test_the_code_of_the_rank_is_the_code_of_the_launcher(command, code):
    launch = ["--standalone", "--nproc-per-node=1", "--max-restarts=0", "--no-python", "sh", "-c", command]
    done = subprocess.run([sys.executable, "-m", "training.ranks", *launch], capture_output=True, check=False)
    assert done.returncode == code, done.stderr.decode()[-500:]
