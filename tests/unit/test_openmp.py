"""torch's CPU kernels run on Intel's OpenMP runtime in services and stages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from steersman import openmp

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the runtime is made for Linux on x86-64"
)

_TORCH_OBEYS = """
import ctypes
from importlib import metadata
{before}
import torch
torch.set_num_threads(3)
path = next(file.locate() for file in metadata.files("intel-openmp") if file.name == "libiomp5.so")
assert torch.ones(1 << 20).sum() == 1 << 20
raise SystemExit(0 if ctypes.CDLL(str(path)).omp_get_max_threads() == 3 else 7)
"""
_PREFER = "from steersman.openmp import prefer_yielding_threads; assert prefer_yielding_threads()"


@pytest.mark.parametrize(("before", "status"), [(_PREFER, 0), ("", 7)])
def test_torch_takes_the_runtime_that_was_loaded_before(before: str, status: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = _TORCH_OBEYS.format(before=before)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr


_ENTERS = """
import runpy, sys
from pathlib import Path
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit:
    pass
assert "torch" not in sys.modules
assert "libiomp5" in Path("/proc/self/maps").read_text()
"""


@pytest.mark.parametrize("module", ["services.policy", "services.reference", "services.reward", "training.stage"])
def test_entry_points_load_it_before_torch(module: str, tmp_path: Path) -> None:
    """Each ends at a file that is missing, which it looks for after that."""
    missing = str(tmp_path / "missing")
    arguments = ["--run-dir", missing, "--stage", "rl"] if module == "training.stage" else ["--config", missing]
    done = subprocess.run(
        [sys.executable, "-c", _ENTERS, module, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "there is no such file" in done.stderr


def test_a_machine_without_the_package_keeps_its_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[metadata.PackagePath]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(openmp.metadata, "files", missing)
    assert not openmp.prefer_yielding_threads()
    monkeypatch.setattr(openmp.metadata, "files", lambda name: [])
    assert not openmp.prefer_yielding_threads()
