"""Rows that begin alike: which of them share a beginning, so that it is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Group:
    """Rows with a common beginning."""

    rows: list[int]
    """Their numbers in the batch."""
    prompt: np.ndarray
    """What all of them begin with; the whole row where there is only one."""
    rests: list[np.ndarray]
    """What follows in each of them; empty where there is only one."""


def share_beginnings(rows: Sequence[np.ndarray]) -> list[Group]:
    """The grouping of rows by common beginnings that leaves the fewest tokens.

    In alphabetical order rows with much in common are neighbours; a run of n neighbours with a common beginning of c
    tokens saves (n - 1) c. Dynamic programming finds the best runs.
    """
    order = sorted(range(len(rows)), key=lambda row: rows[row].tolist())
    common = [common_prefix(rows[one], rows[other]) for one, other in itertools.pairwise(order)]
    saved, start_of_last = [0], [0]
    for end in range(1, len(order) + 1):
        best, start, shared = saved[end - 1], end - 1, len(rows[order[end - 1]])
        for first in range(end - 2, -1, -1):
            shared = min(shared, common[first])
            if not shared:
                break
            if saved[first] + (end - 1 - first) * shared > best:
                best, start = saved[first] + (end - 1 - first) * shared, first
        saved.append(best)
        start_of_last.append(start)
    groups, end = [], len(order)
    while end:
        start = start_of_last[end]
        shared = min(common[start : end - 1], default=len(rows[order[start]]))
        members = order[start:end]
        rests = [rows[member][shared:] for member in members] if len(members) > 1 else []
        groups.append(Group(members, rows[members[0]][:shared], rests))
        end = start
    return groups


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    width = min(len(one), len(other))
    same = one[:width] == other[:width]
    return width if same.all() else int(same.argmin())


def places_of(groups: list[Group], rows: int, width: int) -> np.ndarray:
    """int64 [rows, width]: position of every token in the packed row, -1 where padded."""
    index = np.full((rows, width), -1, dtype=np.int64)
    start, end = 0, sum(len(group.prompt) for group in groups)
    for group in groups:
        shared = len(group.prompt)
        for row, rest in zip(group.rows, group.rests or [np.empty(0, np.int64)], strict=True):
            index[row, :shared] = np.arange(start, start + shared)
            index[row, shared : shared + len(rest)] = np.arange(end, end + len(rest))
            end += len(rest)
        start += shared
    return index
