"""The tests that need a CUDA device, but for those of vLLM, which has an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.setup import Setup

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/unit/policy", "tests/unit/algorithms/test_token_logprobs.py", "tests/unit/nn")
QUICK = ("tests/unit/policy/test_sampling.py",)


def run(setup: Setup) -> dict[str, Any]:
    """On a CPU none of them runs, so there it is a file of the engine's ordinary ones."""
    chosen = ["-m", "gpu and not vllm", *FOLDERS] if setup.cuda else list(QUICK)
    with tempfile.NamedTemporaryFile(suffix=".xml") as found:
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={found.name}", "-x" if setup.quick else "--maxfail=40"]
        if setup.cuda:
            options += ["-n", "4", "--dist", "loadfile"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *chosen],
            cwd=ROOT,
            stdout=sys.stderr,
            check=False,
        )
        suite = next(ElementTree.parse(found.name).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    report: dict[str, Any] = {**counts, "seconds": float(suite.get("time", "0"))}
    report["failed"] = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    report["passed"] = done.returncode == 0
    return report


def rows(report: dict[str, Any]) -> Sequence[Sequence[object]]:
    ran = report["tests"] - report["skipped"]
    return [("tests", f"{ran} ran", f"{report['seconds']:.0f} s", f"{len(report['failed'])} failed")]
