"""The registry of stage kinds: every file beside this one adds one, or more that belong together.

A kind is a class of options with what the rest must know of it: what runs it, which data it reads, whether it trains
the policy, which services it wants, whether several ranks share it. Manifest, schema, CRD, plan and dry run follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from pydantic.alias_generators import to_camel

from steersman.config.base import FrozenModel


@dataclass(frozen=True)
class Place:
    """Where a stage stands: what it may ask of the run around it."""

    where: str
    """Path of the stage in the manifest's spec: `stages.2`."""
    earlier: Sequence[StageOptions]
    later: Sequence[StageOptions]
    data: frozenset[str]
    """Kinds of data that the run has files of, or that the demo makes."""
    demo: bool
    """The demo makes the data."""
    engine: str
    """Of the policy service."""
    has_reward_service: bool
    """The run does not start its own."""
    workers: int
    """Ranks that train."""


class StageOptions(FrozenModel):
    """Options of one kind of stage, and what the rest must know of it."""

    kind: ClassVar[str]
    """Name of the manifest's field, in snake case."""
    title: ClassVar[str]
    """What it is, in a few words."""
    runner: ClassVar[str]
    """`module:function` of `training`, which is called with the options and the stage's context."""
    reads: ClassVar[str | None] = None
    """Kind of data without which it cannot run."""
    trains_policy: ClassVar[bool] = False
    """It leaves a model that later stages, and the release, go on from."""
    uses_services: ClassVar[bool] = False
    """It lets the policy answer prompts, which are rewarded and held against the reference."""
    shared_by_ranks: ClassVar[bool] = False
    """`trainer.workers` ranks share it; other kinds run as one process."""

    @property
    def needed_data(self) -> str | None:
        return self.reads

    def steps_on(self, rows: int) -> int | None:
        """Optimizer steps, or rounds, that it makes of so many training rows; None: it makes none."""
        return None

    def brings_scorers(self) -> list[str]:
        """Names of the rewards that it adds to those of the reward models before it."""
        return []

    def check_place(self, place: Place) -> None:
        """Raises ValueError for a run in which the stage cannot do its work."""

    @classmethod
    def shown(cls, place: Place) -> str:
        """How errors name the stage."""
        return f"{place.where} ({to_camel(cls.kind)})"


STAGES: dict[str, type[StageOptions]] = {}
"""By kind, in the order of the manifest's schema."""
KindT = TypeVar("KindT", bound=type[StageOptions])


def stage(kind: str) -> Callable[[KindT], KindT]:
    """Registers a class of options under the name of its field in the manifest, in snake case."""

    def add(cls: KindT) -> KindT:
        cls.kind = kind
        STAGES[kind] = cls
        return cls

    return add
