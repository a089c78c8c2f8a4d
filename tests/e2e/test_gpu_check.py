"""`make gpu-check` runs as a whole with tiny sizes, without a GPU; a part that fails leaves the others alone."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as check
from benchmarks.gpu import bundle, learning

APART = ("tests", "learning")
"""Run as everything does, in processes of their own; the others here, which spares four of them."""
HERE = [name for name in check.PARTS if name not in ("quickstart", *APART)]
"""The quickstart as a whole is what test_local_run.py runs."""


@pytest.mark.timeout(900)
def test_parts_run_as_processes_with_tiny_sizes(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu_check.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(out),
        "--parts",
        *APART,
    ]
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, check=False)
    logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{logs}"
    report = json.loads(out.read_text())
    assert report["quick"] is True
    assert report["device"] == "cpu"
    found = {name: part["found"] for name, part in report["parts"].items()}
    assert set(found) == set(APART)
    assert found["tests"]["passed"]
    assert found["learning"]["mismatch_mean_abs"] < 1e-4


def test_everything_else_runs_with_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, device: str, *rest: Any) -> dict[str, Any]:
        result = tmp_path / "result.json"
        check._child(name, str(result), device, True, tmp_path)
        return dict(json.loads(result.read_text()))

    monkeypatch.setattr(check, "_run", run)
    options = argparse.Namespace(device="cpu", quick=True, parts=HERE, seconds=600.0, out=tmp_path / "found.json")
    assert check.check(options)
    found = {name: part["found"] for name, part in json.loads(options.out.read_text())["parts"].items()}
    assert set(found) == set(HERE)
    assert found["rollout"]["mismatch"] < 1e-5
    for part in ("update-1b", "update-8b"):
        assert all(one["finite"] and one["gemm_share"] > 0 for one in found[part].values())
    assert {name for name in found["sync"] if "through" in name} == {"full through folder", "lora through folder"}
    assert all(one["logprob_mismatch"] < 1e-4 for name, one in found["sync"].items() if "through" in name)
    assert all(one["megabytes"] > 0 for name, one in found["sync"].items() if "through" in name)


def test_a_part_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(name: str, *rest: Any) -> dict[str, Any]:
        ran.append(name)
        if name == "update-1b":
            return {"error": "RuntimeError: out of memory"}
        return {"found": {"first": 0.1, "last": 0.9, "best": 1.0, "mismatch_mean_abs": 0.0}}

    monkeypatch.setattr(check, "_run", run)
    options = argparse.Namespace(
        device="cpu", quick=True, parts=["update-1b", "learning"], seconds=60.0, out=tmp_path / "found.json"
    )
    assert not check.check(options)
    assert ran == ["update-1b", "learning"]
    assert json.loads(options.out.read_text())["parts"]["learning"]["found"]["last"] == 0.9
    assert "FAILED: RuntimeError: out of memory" in capsys.readouterr().out


def test_a_reward_far_from_the_best_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"PPO reached a reward of 0\.50"):
        learning.judged([0.1, 0.5, 0.5, 0.5, 0.5, 0.5], whole=True)
    assert learning.judged([0.1, 0.2], whole=False) == pytest.approx(0.15)


def test_every_package_of_the_bundle_is_pinned() -> None:
    found = bundle.pinned()
    assert len(found) == len(bundle.PACKAGES)
    assert "protobuf==6.33.6" in found
    with pytest.raises(KeyError):
        bundle.pinned(("no-such-package",))
