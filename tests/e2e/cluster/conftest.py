"""A cluster of one node: the API server's mock, controllers, and a kubelet that runs pods as processes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "unit/controller"))

import sandbox


def pytest_runtest_setup() -> None:
    sandbox.require()
