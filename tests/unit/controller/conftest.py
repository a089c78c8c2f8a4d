from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from world import World


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def condition() -> Callable[[dict[str, Any], str], dict[str, Any]]:
    def find(status: dict[str, Any], kind: str) -> dict[str, Any]:
        return next(item for item in status["conditions"] if item["type"] == kind)

    return find
