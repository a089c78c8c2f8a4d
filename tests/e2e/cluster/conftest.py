"""A cluster of one node: the API server's mock, controllers, and a kubelet that runs pods as processes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / name) for name in ("unit/controller", "unit/chart")]

import sandbox  # noqa: E402


def pytest_runtest_setup() -> None:
    sandbox.require()
