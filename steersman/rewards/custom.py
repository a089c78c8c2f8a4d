"""Somebody's own function as a reward, with the signature of TRL's reward functions.

    def polite(completions, **kwargs) -> list[float | None]: ...

It is called with keyword arguments that are lists over the batch: `prompts` and `completions` (conversations, as TRL
gives them for conversational data), `completion_ids`, and one for each key of the rows (of `facts`, too); besides
`trainer_state` with `global_step` and `max_steps`, and `log_extra` and `log_metric`, whose numbers are metrics. None
says nothing of an answer. It may be `async`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any
from zlib import crc32

from steersman.errors import ConfigError, why
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
        raise ConfigError(f"python: {reference}: {why(error)}; a path starts from the manifest's folder") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"python: {reference}: it cannot be imported ({type(error).__name__}: {error})") from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"python: {reference}: {place} has no function {name}")
    return function


def _from_file(path: Path) -> ModuleType:
    """The file as a module: registered, as dataclasses of it need, and with its neighbours in reach, as of a script."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(f"steersman_reward_{path.stem}_{crc32(bytes(path)):08x}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def custom_reward(reference: str, options: Mapping[str, Any]) -> BatchReward:
    """A function as a reward of batches; `options` are further keyword arguments.

    A wrong number of rewards, or one that is no finite number, is a failure and never a value.

    Raises:
        ConfigError: see `load_function`, or the function does not take an option.
    """
    function = load_function(reference)
    taken = _taken(function)
    for name in options:
        if taken is not None and name not in taken:
            raise ConfigError(f"python: {reference}: options.{name}: the function takes no {name}")

    # One event loop for all batches: what a function keeps between them, a client with open connections, belongs to it.
    runner, turn = asyncio.Runner(), Lock()

    def reward(items: Sequence[Answered]) -> list[Outcome]:
        logged = _Logged(len(items))
        try:
            arguments = {**_columns(items), **_of_trainer(items, logged), **options}
            given = function(**{name: value for name, value in arguments.items() if taken is None or name in taken})
            if inspect.isawaitable(given):
                with turn:
                    given = runner.run(_awaited(given))
        except SystemExit as error:
            raise RuntimeError(f"it called sys.exit({error.code!r})") from None
        try:
            rewards = list(given)
        except TypeError:
            raise ValueError(f"it returned {given!r:.80}; return a list with one reward for each answer") from None
        if len(rewards) != len(items):
            raise ValueError(f"it returned {len(rewards)} rewards for {len(items)} answers; return one for each")
        return [_outcome(value, said) for value, said in zip(rewards, logged.of_answers, strict=True)]

    weakref.finalize(reward, runner.close)
    return reward


def _taken(function: Callable[..., Any]) -> set[str] | None:
    """Names of the arguments that a function takes; None: any, as TRL asks for and most functions do."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}


async def _awaited(given: Awaitable[Any]) -> Any:
    return await given


class _Logged:
    """What a function logs by TRL's `log_extra` and `log_metric`: finite numbers, as criteria of the answers."""

    def __init__(self, answers: int) -> None:
        self.of_answers: list[dict[str, float]] = [{} for _ in range(answers)]

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """A column with a value for each answer; texts are not kept."""
        for said, value in zip(self.of_answers, values, strict=False):
            number = _number(value)
            if number is not None:
                said[str(column)] = number

    def metric(self, name: str, value: Any) -> None:
        """One number for the batch."""
        self.extra(name, [value] * len(self.of_answers))


def _of_trainer(items: Sequence[Answered], logged: _Logged) -> dict[str, Any]:
    from transformers import TrainerState

    done, steps = max((item.progress for item in items), default=(0, 0))
    state = TrainerState(global_step=done, max_steps=steps)
    return {"trainer_state": state, "log_extra": logged.extra, "log_metric": logged.metric}


def _columns(items: Sequence[Answered]) -> dict[str, list[Any]]:
    """What TRL passes: each a list over the batch; a key that a row lacks is None there."""
    keys = dict.fromkeys(key for item in items for key in item.facts)
    columns: dict[str, list[Any]] = {key: [item.facts.get(key) for item in items] for key in keys}
    columns["prompts"] = [[dict(message) for message in item.prompt] for item in items]
    columns["completions"] = [[{"role": "assistant", "content": item.answer}] for item in items]
    columns["completion_ids"] = [list(item.token_ids) for item in items]
    return columns


def _outcome(value: Any, said: Mapping[str, float]) -> Outcome:
    if value is None:
        return None
    number = _number(value)
    if number is None:
        return Failed(f"it returned {value!r:.80}, which is no finite number")
    return Verdict(number, said)


def _number(value: Any) -> float | None:
    """A finite number, whoever's type it has; None for anything else, texts of digits included."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
