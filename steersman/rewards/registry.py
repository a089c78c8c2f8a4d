"""The registry of verifiable rewards."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steersman.errors import ConfigError

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What a reward says of one answer."""

    value: float
    criteria: Mapping[str, float] = field(default_factory=dict)


Reward = Callable[[Messages, str, Mapping[str, Any]], Verdict]
"""(prompt messages, answer, facts) -> verdict. An exception means: no verdict, and says why."""

_FACTORIES: dict[str, Callable[..., Reward]] = {}


def register(name: str) -> Callable[[Callable[..., Reward]], Callable[..., Reward]]:
    """Registers a factory; its keyword arguments are the options in the manifest."""

    def add(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        _FACTORIES[name] = factory
        return factory

    return add


def registered() -> list[str]:
    """Names in alphabetical order."""
    _load_builtin()
    return sorted(_FACTORIES)


def build_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Builds a reward; ConfigError for an unknown name or wrong options."""
    _load_builtin()
    factory = _FACTORIES.get(name)
    if factory is None:
        raise ConfigError(f"reward {name!r} is not registered; there are {', '.join(registered())}")
    try:
        inspect.signature(factory).bind(**(options or {}))
    except TypeError as error:
        raise ConfigError(f"reward {name}: its options do not fit ({error})") from None
    return factory(**(options or {}))


def check_reward(name: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError as `build_reward` does; options whose library is not installed here stay unchecked."""
    with contextlib.suppress(ImportError):
        build_reward(name, options)


def _load_builtin() -> None:
    from steersman.rewards import builtin  # noqa: F401
