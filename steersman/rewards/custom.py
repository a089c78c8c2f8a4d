"""Somebody's own function as a reward, with the signature of TRL's reward functions.

    def polite(completions, **kwargs) -> list[float | None]: ...

It is called with keyword arguments that are lists over the batch: `prompts` and `completions` (conversations, as TRL
gives them for conversational data), `completion_ids`, and one for each key of the rows (of `facts`, too). None says
nothing of an answer. It may be `async`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from steersman.errors import ConfigError
from steersman.rewards.registry import Answered, BatchReward, Failed, Outcome, Verdict


def split_reference(reference: str) -> tuple[str, str]:
    """(module or file, function) of `module:function` or `path/file.py:function`.

    Raises:
        ConfigError: it has another form.
    """
    place, separator, function = reference.rpartition(":")
    if not separator or not place or not function.isidentifier():
        raise ConfigError(f"python: {reference!r} must have the form module:function or path/file.py:function")
    return place, function


def load_function(reference: str) -> Callable[..., Any]:
    """The function that a reference names.

    Raises:
        ConfigError: no such file, module or function, or the module raises when it is imported.
    """
    place, name = split_reference(reference)
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise ConfigError(f"python: {reference}: {error}; a path starts from the manifest's folder") from None
    except Exception as error:
        raise ConfigError(f"python: {reference}: it cannot be imported ({type(error).__name__}: {error})") from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"python: {reference}: {place} has no function {name}")
    return function


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"steersman_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def custom_reward(reference: str, options: Mapping[str, Any]) -> BatchReward:
    """A function as a reward of batches; `options` are further keyword arguments.

    A wrong number of rewards, or one that is no finite number, is a failure and never a value.
    """
    function = load_function(reference)

    def reward(items: Sequence[Answered]) -> list[Outcome]:
        given = function(**_columns(items), **options)
        rewards = asyncio.run(given) if inspect.iscoroutine(given) else given
        rewards = list(rewards)
        if len(rewards) != len(items):
            raise ValueError(f"it returned {len(rewards)} rewards for {len(items)} answers; return one for each")
        return [_outcome(value) for value in rewards]

    return reward


def _columns(items: Sequence[Answered]) -> dict[str, list[Any]]:
    """What TRL passes: each a list over the batch; a key that a row lacks is None there."""
    keys = dict.fromkeys(key for item in items for key in item.facts)
    columns: dict[str, list[Any]] = {key: [item.facts.get(key) for item in items] for key in keys}
    columns["prompts"] = [[dict(message) for message in item.prompt] for item in items]
    columns["completions"] = [[{"role": "assistant", "content": item.answer}] for item in items]
    columns["completion_ids"] = [list(item.token_ids) for item in items]
    return columns


def _outcome(value: Any) -> Outcome:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return Failed(f"it returned {value!r}, which is no number")
    return Verdict(number) if math.isfinite(number) else Failed(f"it returned {number}, which is no finite number")
