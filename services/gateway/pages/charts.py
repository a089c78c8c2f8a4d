"""Charts as plain SVG in percent of their box: no script, no style attribute, so that the content policy holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

_MOST_SERIES = 6
"""As many colours as stay apart; what is beyond them is drawn together."""


@dataclass(frozen=True)
class Mark:
    """A moment on the time axis, drawn as a numbered line."""

    number: int
    place: float
    """From 0 to 1 along the axis."""
    name: str


@dataclass(frozen=True)
class Box:
    """A bar, or a piece of a line; all in percent of the chart."""

    series: int
    x: float
    y: float
    width: float
    height: float
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """Series over the same spans of time."""

    title: str
    unit: str
    kind: Literal["bars", "lines"]
    """Bars stand upon each other; lines leave out what is None."""
    times: Sequence[str]
    """Name of every span of time."""
    series: Mapping[str, Sequence[float | None]]

    @property
    def empty(self) -> bool:
        return not any(value for values in self.series.values() for value in values)

    @property
    def heights(self) -> list[float]:
        """The highest point of every span of time."""
        columns = [[value or 0.0 for value in column] for column in zip(*self.series.values(), strict=True)]
        return [sum(column) if self.kind == "bars" else max(column) for column in columns]

    @property
    def top(self) -> float:
        """Upper end of the axis: 1, 2 or 5 times a power of ten, at least 1."""
        highest = max(self.heights, default=0.0)
        if highest <= 1:
            return 1.0
        power = 10.0 ** math.floor(math.log10(highest))
        return next(step * power for step in (1, 2, 5, 10) if highest <= step * power)

    @property
    def bars(self) -> list[Box]:
        step, found = 100 / max(len(self.times), 1), []
        for at, time in enumerate(self.times):
            below = 0.0
            for number, (name, values) in enumerate(self.series.items()):
                value = values[at] or 0.0
                height = 100 * value / self.top
                below += height
                if value:
                    title = f"{time}: {value:,.0f} {name}"
                    found.append(Box(number, at * step + 0.1 * step, 100 - below, 0.8 * step, height, title))
        return found

    @property
    def dots(self) -> list[Box]:
        """The points of the lines, in the middle of their span of time."""
        step = 100 / max(len(self.times), 1)
        return [
            Box(number, (at + 0.5) * step, 100 - 100 * value / self.top, 0, 0, f"{self.times[at]}: {value:,.0f} {name}")
            for number, (name, values) in enumerate(self.series.items())
            for at, value in enumerate(values)
            if value is not None
        ]

    @property
    def pieces(self) -> list[Box]:
        """From every point to the next of the same line; a span of time without a value parts them."""
        step = 100 / max(len(self.times), 1)
        found = []
        for number, values in enumerate(self.series.values()):
            for at, (one, other) in enumerate(pairwise(values)):
                if one is not None and other is not None:
                    y = 100 - 100 * one / self.top
                    found.append(Box(number, (at + 0.5) * step, y, step, 100 * (one - other) / self.top))
        return found

    @property
    def said(self) -> str:
        """The chart in words, for who cannot see it."""
        if self.empty:
            return f"{self.title}: nothing in this time"
        if self.kind == "lines":
            return f"{self.title}: at most {max(self.heights):,.0f} {self.unit}"
        sums = {name: sum(value or 0.0 for value in values) for name, values in self.series.items()}
        return f"{self.title}: " + ", ".join(f"{total:,.0f} {name}" for name, total in sums.items())


def largest(counts: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The most frequent series first; those beyond the colours added up as 'other'."""
    ordered = sorted(counts.items(), key=lambda item: (-sum(item[1]), item[0]))
    if len(ordered) <= _MOST_SERIES:
        return dict(ordered)
    rest = [values for _, values in ordered[_MOST_SERIES - 1 :]]
    return {**dict(ordered[: _MOST_SERIES - 1]), "other": [sum(column) for column in zip(*rest, strict=True)]}
