"""Who wins against whom: win rates, and strengths of many versions from their comparisons (Bradley and Terry 1952).

    P(i wins against j) = 1 / (1 + exp(s_j - s_i)),   a tie counts as half a win of each

The strengths s are the maximum of the likelihood with a tie added to each pair that was compared, so that a version
that never lost has a finite strength; the first version's is 0. Intervals come from a bootstrap over prompts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from steersman.errors import DataError
from steersman.statistics import BOOTSTRAP_DRAWS, Interval, wilson_interval

PRIOR = 0.5
_ROUNDS = 500
_DRAWS = min(1000, BOOTSTRAP_DRAWS)


class Duel(NamedTuple):
    """One comparison: which of two versions won on a prompt."""

    prompt: Hashable
    one: str
    other: str
    score: float
    """1: `one` wins; 0: `other` does; 0.5: a tie."""


class WinRate(NamedTuple):
    """How often one version wins against another."""

    rate: Interval
    """Ties count half; Wilson's interval over prompts."""
    wins: int
    """Comparisons."""
    ties: int
    losses: int
    prompts: int


def win_rate(duels: Sequence[Duel], one: str, other: str) -> WinRate:
    """Of `one` against `other`, whichever way round the duels name them."""
    scores = [
        (duel.prompt, duel.score if duel.one == one else 1.0 - duel.score)
        for duel in duels
        if {duel.one, duel.other} == {one, other}
    ]
    if not scores:
        raise DataError(f"{one} and {other} were never compared")
    by_prompt: dict[Hashable, list[float]] = {}
    for prompt, score in scores:
        by_prompt.setdefault(prompt, []).append(score)
    means = [sum(values) / len(values) for values in by_prompt.values()]
    values = [score for _, score in scores]
    return WinRate(
        rate=wilson_interval(sum(means), len(means)),
        wins=sum(value > 0.5 for value in values),
        ties=sum(value == 0.5 for value in values),
        losses=sum(value < 0.5 for value in values),
        prompts=len(means),
    )


class Row(NamedTuple):
    """A line of the matrix of wins."""

    name: str
    cells: list[WinRate | None]
    """Against every version in order; None: never compared, or itself."""
    strength: Interval | None
    """None where not all versions are connected by comparisons."""


def matrix(duels: Sequence[Duel], names: Sequence[str]) -> list[Row]:
    """Everybody's wins against everybody, and strengths; empty without a comparison."""
    pairs = {frozenset((duel.one, duel.other)) for duel in duels}
    if not pairs:
        return []
    try:
        logits: dict[str, Interval] = strengths(duels, names)
    except DataError:
        logits = {}
    return [
        Row(
            name,
            [win_rate(duels, name, other) if frozenset((name, other)) in pairs and name != other else None
             for other in names],
            logits.get(name),
        )
        for name in names
    ]  # fmt: skip


def strengths(duels: Sequence[Duel], names: Sequence[str]) -> dict[str, Interval]:
    """Logits by version with 95% intervals; the first one's is 0.

    Raises:
        DataError: a version is connected with the first one by no comparison.
    """
    place = {name: index for index, name in enumerate(names)}
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(duel.prompt for duel in duels))}
    table = np.zeros((len(prompts), len(names), len(names)))
    for duel in duels:
        one, other = place[duel.one], place[duel.other]
        table[prompts[duel.prompt], one, other] += duel.score
        table[prompts[duel.prompt], other, one] += 1.0 - duel.score
    total = table.sum(0)
    _check_connected(total + total.T > 0, names)
    found = bradley_terry(total[None], PRIOR)[0]
    draws = np.random.default_rng(0).multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), _DRAWS)
    drawn = np.tensordot(draws.astype(float), table, axes=(1, 0))
    # A draw without a comparison that connects two versions still has the prior's, which all draws share.
    spread = bradley_terry(drawn, PRIOR, compared=total + total.T > 0)
    low, high = np.quantile(spread, (0.025, 0.975), axis=0)
    return {name: Interval(float(found[i]), float(low[i]), float(high[i])) for i, name in enumerate(names)}


def bradley_terry(wins: np.ndarray, prior: float = 0.0, compared: np.ndarray | None = None) -> np.ndarray:
    """Logits [B, M] from wins [B, M, M] of row against column, by Hunter's MM iteration (2004); column 0 is 0.

    Args:
        prior: wins that are added on both sides of a pair that was compared.
        compared: bool [M, M], which pairs get the prior; None: those with wins.
    """
    pairs = (wins + wins.transpose(0, 2, 1) > 0) if compared is None else np.broadcast_to(compared, wins.shape)
    wins = wins + prior * pairs
    games, won = wins + wins.transpose(0, 2, 1), wins.sum(2)
    p = np.ones(won.shape)
    for _ in range(_ROUNDS):
        new = won / np.maximum((games / (p[:, :, None] + p[:, None, :])).sum(2), 1e-300)
        new = np.maximum(new, 1e-12)
        new /= np.exp(np.log(new).mean(1, keepdims=True))
        done = np.abs(np.log(new) - np.log(p)).max() < 1e-10
        p = new
        if done:
            break
    logits: np.ndarray = np.log(p)
    return logits - logits[:, :1]


def _check_connected(compared: np.ndarray, names: Sequence[str]) -> None:
    reached = {0}
    while True:
        more = {int(j) for i in reached for j in np.flatnonzero(compared[i])} - reached
        if not more:
            break
        reached |= more
    if len(reached) < len(names):
        lone = next(name for index, name in enumerate(names) if index not in reached)
        raise DataError(f"{lone} is connected with {names[0]} by no comparison; compare it with one of the others")
