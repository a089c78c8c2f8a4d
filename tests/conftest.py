"""Fixtures that every suite shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.openmp import prefer_yielding_threads

prefer_yielding_threads()  # as services and stages do, before anything imports torch

pytest_plugins = ["live_services"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real sample rows of public data sets; it lies beside a development checkout."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real data samples are not at {path}")
    return path
