"""The registry of computed rewards.

A reward says what one answer is worth (`register`), or what a batch of answers is worth (`register_batch`): where a
model, a comparison or somebody's own function wants all of them at once. Whoever asks for a batch gets one either way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from steersman.errors import ConfigError, meant

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What a reward says of one answer."""

    value: float
    criteria: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """An answer in its conversation."""

    prompt: Messages
    answer: str
    facts: Mapping[str, Any]
    """The row's `facts` and its further keys."""
    token_ids: Sequence[int] = ()
    """Of the answer, where the caller knows them."""
    progress: tuple[int, int] = (0, 0)
    """Steps of the training that are done, and all of them."""


@dataclass(frozen=True)
class Failed:
    """No verdict, and why."""

    reason: str


Reward = Callable[[Messages, str, Mapping[str, Any]], Verdict]
"""(prompt messages, answer, facts) -> verdict. An exception means: no verdict, and says why."""
Outcome = Verdict | Failed | None
"""None: the reward has nothing to say of this answer, which is no failure."""
BatchReward = Callable[[Sequence[Answered]], Sequence[Outcome]]
"""Answers -> one outcome each, in order. An exception means: no verdict for any of them."""

_FACTORIES: dict[str, Callable[..., Reward]] = {}
_BATCH_FACTORIES: dict[str, Callable[..., BatchReward]] = {}
_MODULES = ("builtin", "judge", "metrics")
_AT_ONCE = 8
"""Answers that a reward of single answers is asked about at a time: some wait for a network."""


def register(name: str) -> Callable[[Callable[..., Reward]], Callable[..., Reward]]:
    """Registers a factory of a reward of single answers; its keyword arguments are the options in the manifest."""

    def add(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        _FACTORIES[name] = factory
        return factory

    return add


def register_batch(name: str) -> Callable[[Callable[..., BatchReward]], Callable[..., BatchReward]]:
    """Registers a factory of a reward of batches, likewise."""

    def add(factory: Callable[..., BatchReward]) -> Callable[..., BatchReward]:
        _BATCH_FACTORIES[name] = factory
        return factory

    return add


def registered() -> list[str]:
    """Names in alphabetical order."""
    _load_modules()
    return sorted([*_FACTORIES, *_BATCH_FACTORIES])


def build_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Builds a reward of single answers; ConfigError for an unknown name or wrong options."""
    make = _maker(name, options or {})
    if name in _FACTORIES:
        single: Reward = make()
        return single
    batch: BatchReward = make()

    def reward(prompt: Messages, answer: str, facts: Mapping[str, Any]) -> Verdict:
        (outcome,) = batch([Answered(prompt, answer, facts)])
        if not isinstance(outcome, Verdict):
            raise ValueError(outcome.reason if outcome else "it has nothing to say of this answer")
        return outcome

    return reward


def build_batch_reward(name: str, options: Mapping[str, Any] | None = None) -> BatchReward:
    """Builds a reward of batches from any registered one; ConfigError for an unknown name or wrong options."""
    built = _maker(name, options or {})()
    return built if name in _BATCH_FACTORIES else one_by_one(built)


def one_by_one(reward: Reward) -> BatchReward:
    """A reward of batches that asks for one answer after the other, several at a time."""

    def outcome(item: Answered) -> Outcome:
        try:
            return reward(item.prompt, item.answer, item.facts)
        except Exception as error:
            return Failed(str(error))

    def batch(items: Sequence[Answered]) -> list[Outcome]:
        with ThreadPoolExecutor(min(_AT_ONCE, len(items)) or 1, thread_name_prefix="reward") as threads:
            return list(threads.map(outcome, items))

    return batch


def check_reward(name: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError as `build_reward` does, but builds only rewards that load nothing: a manifest is read also
    where the files that it names are not."""
    make = _maker(name, options)
    if name in _FACTORIES:
        with contextlib.suppress(ImportError):
            make()


def _maker(name: str, options: Mapping[str, Any]) -> Callable[[], Any]:
    """Makes the reward with options of the types that it names."""
    _load_modules()
    factory = _FACTORIES.get(name) or _BATCH_FACTORIES.get(name)
    if factory is None:
        raise ConfigError(
            f"reward {name!r} is not registered; there are {', '.join(registered())}, and python: FILE:FUNCTION"
            f"{meant(name, registered())}"
        )
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(f"reward {name}: its options do not fit ({error})") from None
    types = get_type_hints(factory)
    typed = {option: _typed(name, option, value, types.get(option, Any)) for option, value in options.items()}
    return functools.partial(factory, **typed)


def _typed(name: str, option: str, value: Any, wanted: Any) -> Any:
    """The option's value as the type that it is to have."""
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False)
        raise ConfigError(f"reward {name}: {option} is {value!r:.100}: {first['msg'].lower()}") from None


def _load_modules() -> None:
    for module in _MODULES:
        importlib.import_module(f"steersman.rewards.{module}")
