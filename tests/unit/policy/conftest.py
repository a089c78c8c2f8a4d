"""Where the engines compute."""

from __future__ import annotations

import pytest
from engine_client import CUDA


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that takes an engine runs on both."""
    return request.param
