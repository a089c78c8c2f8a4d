"""What a labeler can say about an item, and the votes that it amounts to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field

from steersman.errors import InvalidArgumentError
from steersman.store.models import Project, ProjectKind

KINDS = get_args(ProjectKind)
MAX_CANDIDATES = 6

Rating = Annotated[int, Field(ge=1, le=5)]


class Verdict(BaseModel):
    """One labeler's verdict; candidates are named by their position in the item, not by the order shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranking: tuple[tuple[int, ...], ...] | None = None
    """compare, rank: groups of equally good candidates, best first; ((1,), (0,)) prefers the second of two."""
    strength: Annotated[int, Field(ge=1, le=3)] | None = None
    """compare: 1 slightly, 2 clearly, 3 far better; becomes the margin."""
    ratings: dict[str, Rating] | None = None
    """rate: 1 to 5 for each aspect."""
    edit: str | None = None
    """edit: the better answer."""
    skip: bool = False
    unsafe: bool = False
    """An answer must not be trained on."""
    note: str = ""

    def check(self, project: Project, candidates: int) -> None:
        """Raises InvalidArgumentError when the verdict does not answer the project's question."""
        if self.skip:
            return
        if project.kind in ("compare", "rank"):
            if self.ranking is None or sorted(index for group in self.ranking for index in group) != list(
                range(candidates)
            ):
                raise InvalidArgumentError(
                    f"ranking: {self.ranking!r} must name each of the {candidates} answers once, from 0"
                )
        elif project.kind == "rate":
            if set(self.ratings or {}) != set(project.aspects):
                raise InvalidArgumentError(f"ratings: rate each of {', '.join(project.aspects)} from 1 to 5")
        elif not (self.edit and self.edit.strip()):
            raise InvalidArgumentError("edit: the text is empty; write the better answer or skip")

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_defaults=True)


@dataclass(frozen=True, slots=True)
class Vote:
    """An answer to one question about one unit."""

    question: str
    """"preference" or an aspect's name."""
    unit: int
    """Which pair of answers, numbered as `itertools.combinations` does; 0 for a rating."""
    value: int
    """Of a preference: 0 for the first of the pair, 1 for a tie, 2 for the second."""


def votes(verdict: dict[str, Any]) -> Iterator[Vote]:
    """The votes of a stored verdict: one a pair of answers, or one an aspect."""
    if verdict.get("skip"):
        return
    if ranking := verdict.get("ranking"):
        place = {candidate: at for at, group in enumerate(ranking) for candidate in group}
        for unit, (one, two) in enumerate(combinations(sorted(place), 2)):
            yield Vote("preference", unit, (place[one] > place[two]) - (place[one] < place[two]) + 1)
    for aspect, value in (verdict.get("ratings") or {}).items():
        yield Vote(aspect, 0, value)


def is_right(verdict: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether a honeypot was judged as expected: the same preferences, ratings at most one apart."""
    if verdict.get("skip") or bool(verdict.get("unsafe")) != bool(expected.get("unsafe")):
        return False
    given = {(vote.question, vote.unit): vote.value for vote in votes(verdict)}
    for vote in votes(expected):
        apart = abs(given.get((vote.question, vote.unit), 99) - vote.value)
        if apart > (0 if vote.question == "preference" else 1):
            return False
    return True
