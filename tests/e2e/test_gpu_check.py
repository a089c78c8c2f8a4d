"""`make gpu-check` runs as a whole with tiny sizes, without a GPU; a part that fails leaves the others alone."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu import __main__ as check
from benchmarks.gpu import bundle, learning, suite

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


_ONLY_KNOWN = """
import importlib.metadata, json, os, sys

allowed = set(json.loads(os.environ["ALLOWED"]))
modules = importlib.metadata.packages_distributions()
missing = {
    name
    for name, found in modules.items()
    if not allowed.intersection(one.lower().replace("_", "-") for one in found)
}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in missing:
            return
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if "site-packages" not in frame.f_code.co_filename:  # libraries look for what they can do without
            raise ModuleNotFoundError(f"the GPU machine lacks {name}", name=name)

sys.meta_path.insert(0, Missing())
"""


def with_requirements(packages: Iterable[str]) -> set[str]:
    """Packages and what they require, by their normal names."""
    found: set[str] = set()
    ahead = [*packages]
    while ahead:
        name = canonicalize_name(ahead.pop())
        if name not in found:
            found.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # nothing that this platform wants
                wanted = map(Requirement, importlib.metadata.requires(name) or ())
                ahead += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def test_the_gpu_tests_load_with_what_such_a_machine_has(repo_root: Path, tmp_path: Path) -> None:
    """Its own libraries and the bundle's; one more import in any of their files would end them there, unseen here."""
    (tmp_path / "only_known.py").write_text(_ONLY_KNOWN)
    allowed = with_requirements(bundle.PRESENT) | set(map(canonicalize_name, bundle.PACKAGES)) | {"steersman"}
    environment = os.environ | {
        "PYTHONPATH": f"{repo_root}:{tmp_path}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "ALLOWED": json.dumps(sorted(allowed)),
    }
    options = [
        "-p",
        "pytest_asyncio",
        "-p",
        "pytest_timeout",
        "-p",
        "only_known",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "-q",
        "-m",
        "gpu",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *suite.FOLDERS],
        cwd=repo_root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "test_recorded_steps" in done.stdout


def test_every_package_of_the_bundle_is_pinned() -> None:
    found = bundle.pinned()
    assert len(found) == len(bundle.PACKAGES)
    assert "protobuf==6.33.6" in found
    with pytest.raises(KeyError):
        bundle.pinned(("no-such-package",))
