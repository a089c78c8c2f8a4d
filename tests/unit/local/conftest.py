"""Fixtures of the tests of local execution."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from local_helpers import TOY, manifest

from steersman.config.manifest import AlignmentRun


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of children that can import the toy service."""
    monkeypatch.delenv("STEERSMAN_PROGRESS", raising=False)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "toy_service.py").write_text(TOY)
    return os.environ | {"PYTHONPATH": str(tmp_path / "modules")}


@pytest.fixture
def run() -> AlignmentRun:
    return manifest()
