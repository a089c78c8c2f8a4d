"""Where the engines compute."""

from __future__ import annotations

import pytest
from engine_client import CUDA

from services.policy.engines import cpu_layers


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that takes an engine runs on both."""
    return request.param


@pytest.fixture(params=[True, False], ids=["few-rows", "many-rows"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a few rows are decoded by other code than many; tiny models' batches are always few."""
    if not request.param:
        monkeypatch.setattr(cpu_layers, "MOST_SCORES", 0)
        monkeypatch.setattr(cpu_layers, "FEW_ROWS", 0)
