"""Where training begins to please the reward only (Gao, Schulman, Hilton, "Scaling laws for reward model
overoptimization", ICML 2023): the reward and scorers that training never uses along the checkpoints, by KL.

A look asks the policy the same prompts with the same seeds as every other look, so that two looks are paired by prompt.

The alarm sounds at a look when, against one of the earlier ones, a scorer that training never uses has fallen while the
reward has risen: two one-sided paired t tests, both of which must reject (an intersection-union test, whose level is
that of either one). With `planned` looks and S scorers there are planned (planned - 1) / 2 x S comparisons in all; each
is tested at that part of `false_alarms` (Bonferroni), so that a whole training in which nothing falls while the reward
rises has an alarm with at most this chance, however early one stops. `make bench-gates` simulates it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import special

from steersman.artifacts import write_whole
from steersman.statistics import Interval, compare

LOOKS_FILE = "watch.jsonl"


class Look(BaseModel):
    """One checkpoint on the watched prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    step: int = Field(ge=0)
    """Steps that were done."""
    kl: float
    """To the reference, in nats an answer."""
    reward: dict[str, float]
    """What is trained on, by prompt; prompts without a reward are left out."""
    scorers: dict[str, dict[str, float]]
    """What training never uses: scorer to prompt to value."""

    def mean(self, scorer: str | None = None) -> float:
        """Of the reward, or of one scorer; NaN without a value."""
        values = self.values(scorer)
        return sum(values.values()) / len(values) if values else math.nan

    def values(self, scorer: str | None = None) -> dict[str, float]:
        return self.reward if scorer is None else self.scorers.get(scorer, {})


class Alarm(NamedTuple):
    """A scorer that fell while the reward rose."""

    scorer: str
    before: int
    """Step that is compared with."""
    step: int
    fall: Interval
    """Change of the scorer."""
    rise: Interval
    """Change of the reward."""
    p_value: float
    """The larger of both tests', times the number of planned comparisons."""

    @property
    def text(self) -> str:
        return (
            f"from step {self.before} to {self.step} the reward rises by {self.rise.estimate:.3g} "
            f"({self.rise.low:.3g} to {self.rise.high:.3g}), but {self.scorer}, which training never uses, falls by "
            f"{-self.fall.estimate:.3g} ({-self.fall.high:.3g} to {-self.fall.low:.3g}; p = {self.p_value:.2g} over "
            "all planned looks)"
        )


class Goodhart(NamedTuple):
    """Gao et al.'s law for reinforcement learning, fitted to one scorer: R(d) = d (alpha - beta ln d)."""

    alpha: float
    beta: float
    explained: float = 1.0
    """Share of the looks' variance that the fit explains (R²)."""

    def at(self, kl: float) -> float:
        """The change that the law expects."""
        d = math.sqrt(max(kl, 0.0))
        return d * (self.alpha - self.beta * math.log(d)) if d > 0 else 0.0

    @property
    def peak_kl(self) -> float | None:
        """KL of its maximum, nats; None where it has none."""
        return math.exp(2 * (self.alpha / self.beta - 1)) if self.beta > 0 else None


def find_alarm(looks: Sequence[Look], planned: int, false_alarms: float) -> Alarm | None:
    """The alarm of the last look, the surest one; None when all is well.

    Args:
        planned: looks of the whole training, the first one, before any step, included.
        false_alarms: chance of an alarm in a training that needs none.
    """
    if len(looks) < 2:
        return None
    last = looks[-1]
    comparisons = max(planned, len(looks)) * (max(planned, len(looks)) - 1) // 2 * max(1, len(last.scorers))
    found: list[tuple[float, Look, str]] = []
    for earlier in looks[:-1]:
        p_rise = _p_value(earlier, last, None, +1)
        for scorer in last.scorers:
            p_value = min(1.0, max(p_rise, _p_value(earlier, last, scorer, -1)) * comparisons)
            if p_value <= false_alarms:
                found.append((p_value, earlier, scorer))
    if not found:
        return None
    p_value, earlier, scorer = min(found, key=lambda one: one[0])
    fall, rise = _change(earlier, last, scorer), _change(earlier, last, None)
    return Alarm(scorer, earlier.step, last.step, fall, rise, p_value)


def recommended(looks: Sequence[Look]) -> Look:
    """The newest look that no scorer calls worse than its best look by more than one standard error of their paired
    difference (Breiman's rule, towards more training)."""
    best = {scorer: max(looks, key=lambda look: _or_least(look.mean(scorer))) for scorer in looks[-1].scorers}

    def good(look: Look) -> bool:
        return all(_shortfall(top, look, scorer) <= 1.0 for scorer, top in best.items())

    fallback = max(looks, key=lambda look: sum(_or_least(look.mean(scorer)) for scorer in best))
    return next((look for look in reversed(looks) if good(look)), fallback)


def parting(looks: Sequence[Look], scorer: str) -> Look | None:
    """The look after which reward and scorer part: the scorer's best one, where the reward is higher and the scorer
    lower at the last look; None where they go together to the end."""
    top = max(looks, key=lambda look: _or_least(look.mean(scorer)))
    last = looks[-1]
    return top if last.mean() > top.mean() and last.mean(scorer) < top.mean(scorer) else None


def fit(looks: Sequence[Look], scorer: str) -> Goodhart | None:
    """Least squares over the looks' mean change since the first one; None with fewer than three at a KL above 0."""
    first, *others = looks
    points = [(math.sqrt(one.kl), one.mean(scorer) - first.mean(scorer)) for one in others if one.kl > 0]
    points = [(d, change) for d, change in points if math.isfinite(change)]
    if len({round(d, 9) for d, _ in points}) < 3:
        return None
    d, change = (np.array(column) for column in zip(*points, strict=True))
    alpha, slope = np.linalg.lstsq(np.stack([d, d * np.log(d)], 1), change, rcond=None)[0]
    law = Goodhart(float(alpha), -float(slope))
    left = float(np.square(change - [law.at(one**2) for one in d]).sum())
    spread = float(np.square(change - change.mean()).sum())
    return law._replace(explained=max(0.0, 1.0 - left / spread) if spread > 0 else 0.0)


def read_looks(path: Path) -> tuple[Look, ...]:
    """Of `watch.jsonl`, oldest first; a torn last line of a killed run is left out."""
    if not path.is_file():
        return ()
    lines = path.read_bytes().splitlines(keepends=True)
    return tuple(Look.model_validate_json(line) for line in lines if line.endswith(b"\n"))


def write_looks(path: Path, looks: Sequence[Look]) -> None:
    """Whole or not at all."""
    write_whole(path, "".join(look.model_dump_json() + "\n" for look in looks))


def summary(looks: Sequence[Look], planned: int, false_alarms: float) -> dict[str, Any]:
    """What report and `summary.json` hold: the curve, where it parts, what is recommended, the first alarm."""
    scorers = list(looks[-1].scorers)
    alarms = (find_alarm(looks[: end + 1], planned, false_alarms) for end in range(len(looks)))
    alarm = next((one for one in alarms if one is not None), None)
    parts = {scorer: parting(looks, scorer) for scorer in scorers}
    laws = {scorer: fit(looks, scorer) for scorer in scorers}
    return {
        "curve": [
            {"step": look.step, "kl": _round(look.kl), "reward": _round(look.mean())}
            | {scorer: _round(look.mean(scorer)) for scorer in scorers}
            for look in looks
        ],
        "parts_at": {
            name: None if one is None else {"step": one.step, "kl": _round(one.kl)} for name, one in parts.items()
        },
        "peak_kl": {
            name: None if law is None or law.peak_kl is None else _round(law.peak_kl) for name, law in laws.items()
        },
        "law_explains": {name: None if law is None else round(law.explained, 4) for name, law in laws.items()},
        "recommended": recommended(looks).step,
        "alarm": None if alarm is None else {"step": alarm.step, "scorer": alarm.scorer, "text": alarm.text},
        "false_alarms": false_alarms,
    }


def _pairs(before: Look, after: Look, scorer: str | None) -> tuple[list[float], list[float]]:
    one, two = before.values(scorer), after.values(scorer)
    keys = [key for key in one if key in two]
    return [one[key] for key in keys], [two[key] for key in keys]


def _change(before: Look, after: Look, scorer: str | None) -> Interval:
    """Paired difference with its interval."""
    return compare(*_pairs(before, after, scorer)).difference


def _p_value(before: Look, after: Look, scorer: str | None, sign: int) -> float:
    """One-sided, that the paired difference has this sign; 1 with fewer than three pairs."""
    one, two = _pairs(before, after, scorer)
    if len(one) < 3:
        return 1.0
    difference = sign * (np.array(two) - np.array(one))
    if np.ptp(difference) <= 1e-12 * np.abs(difference).max():
        # Of equal differences a t test knows nothing; each by itself is a toss of a coin.
        return 0.5 ** len(difference) if difference[0] > 0 else 1.0
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return float(special.stdtr(len(difference) - 1, -difference.mean() / error))


def _shortfall(top: Look, look: Look, scorer: str) -> float:
    """How much lower than `top`, in standard errors of the paired difference."""
    one, two = top.values(scorer), look.values(scorer)
    difference = np.array([one[key] - two[key] for key in one if key in two])
    if not len(difference):
        return math.inf
    mean = float(difference.mean())
    if mean <= 0 or len(difference) < 2:
        return 0.0 if mean <= 0 else math.inf
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return mean / error if error > 0 else math.inf


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _round(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
