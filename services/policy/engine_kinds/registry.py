"""The registry of engines: every file beside this one adds one, with its options and what makes it.

Nothing here imports torch or an engine's libraries until the engine is made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from services.policy.engine import Engine
from steersman.config.base import FrozenModel


@dataclass(frozen=True)
class Served:
    """What every engine is given."""

    folder: Path
    """The model."""
    name: str
    """What the service calls it."""
    compute: dict[str, Any]
    """precision, device, threads, max_context, kv_cache_tokens."""
    on_death: Callable[[], None]
    """Called where it cannot go on."""


class EngineOptions(FrozenModel):
    """Options of one engine."""

    holds_heads: ClassVar[bool] = False
    """It samples with the Q and V heads of ILQL, and from the sets of a mask policy."""

    @abstractmethod
    def build(self, served: Served) -> Engine:
        """Raises ConfigError where it cannot be made in this installation."""


ENGINES: dict[str, type[EngineOptions]] = {}
"""By what the configuration calls them."""


def engine(name: str) -> Callable[[type[EngineOptions]], type[EngineOptions]]:
    """Registers a class of options: `engine: NAME`, and where it has fields, a block of that name."""

    def add(cls: type[EngineOptions]) -> type[EngineOptions]:
        ENGINES[name] = cls
        return cls

    return add
