"""Can the canary tell a worse candidate from an equal one? Simulated canaries, decided by the controller's own tests.

    python -m benchmarks.canary --canaries 2000

Every canary gets judgements at random, a share of them for the candidate, and is looked at after every --every
judgements, `steersman/canary.py` weighing judgements, errors and latency. Requests are many more than judgements; both
variants fail and hesitate equally. Prints a table and writes build/bench/canary.json:

    false_rollback       of candidates as good as the champion: share taken back, watched to the end without promotion
    promoted_harm5       of candidates with 5 points more thumbs down: share promoted before it was taken back
    median_judgements_*  judgements of both variants until the harm is found; never found counts as infinite

Targets: at most 5%, at most 5%, below 2,000 at 5 points and below 500 at 10 points, at an even split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.report import command_line, heading, table, write
from steersman.canary import Arm, advance, findings, tests
from steersman.config.manifest import Canary

CHAMPION = 0.2
"""Share of thumbs down."""
REQUESTS = 10
"""Requests for each judgement."""
ERRORS, SLOW = 0.005, 0.2
"""Of either variant: share of failed requests, and of answers slower than 1.5 times the median."""


@dataclass(frozen=True)
class Outcome:
    """Of many canaries: judgements after which each was taken back or could be promoted; infinite: never."""

    taken_back: np.ndarray
    harmless: np.ndarray

    def rolled_back(self) -> float:
        """Share that is taken back, whatever else could have happened."""
        return float(np.isfinite(self.taken_back).mean())

    def promoted(self) -> float:
        """Share that is promoted before it is taken back."""
        return float((self.harmless < self.taken_back).mean())

    def judgements(self) -> float:
        return float(np.median(self.taken_back))

    def until_promotion(self) -> float:
        return float(np.median(self.harmless))


def simulate(
    champion: float,
    candidate: float,
    *,
    canaries: int,
    judgements: int,
    every: int = 10,
    share: float = 0.5,
    seed: int = 0,
) -> Outcome:
    """Watches many canaries at the same time.

    Args:
        champion, candidate: share of thumbs down.
        judgements: where each ends.
        every: judgements between two looks.
        share: of the judgements that go to the candidate.
    """
    limits = Canary()
    draw = np.random.default_rng(seed)
    arms = [dict.fromkeys(Arm.model_fields, np.zeros(canaries)) for _ in range(2)]
    logs: dict[str, Any] = {name: np.zeros(canaries) for name in tests(limits)}
    taken_back, harmless = np.full(canaries, np.inf), np.full(canaries, np.inf)
    for look in range(1, judgements // every + 1):
        judged = draw.binomial(every, share, canaries)
        seen = [
            _more(arm, number, bad, draw)
            for arm, number, bad in zip(arms, (every - judged, judged), (champion, candidate), strict=True)
        ]
        logs = advance(logs, look - 1, (arms[0], arms[1]), (seen[0], seen[1]), limits)
        arms = seen
        found = findings(logs, look, limits)
        against = found["errors"] | found["latency"] | found["judgements"]
        taken_back[against & np.isinf(taken_back)] = look * every
        harmless[found["harmless"] & ~against & np.isinf(harmless)] = look * every
    return Outcome(taken_back, harmless)


def _more(arm: dict[str, Any], judged: np.ndarray, bad: float, draw: np.random.Generator) -> dict[str, Any]:
    """The counts after `judged` further judgements and the requests that belong to them."""
    requests = judged * REQUESTS
    added = {
        "judged": judged,
        "bad": draw.binomial(judged, bad),
        "requests": requests,
        "errors": draw.binomial(requests, ERRORS),
        "timed": requests,
        "slow": draw.binomial(requests, SLOW),
    }
    return {name: arm[name] + added[name] for name in arm}


def measure(canaries: int, judgements: int, every: int) -> dict[str, Any]:
    """The cases of the table, and the figures by name."""
    cases = {
        "better by 3 points": (CHAMPION - 0.03, 0.5),
        "equal": (CHAMPION, 0.5),
        "equal, a tenth of the traffic": (CHAMPION, 0.1),
        "worse by 5 points": (CHAMPION + 0.05, 0.5),
        "worse by 5 points, a tenth of the traffic": (CHAMPION + 0.05, 0.1),
        "worse by 10 points": (CHAMPION + 0.10, 0.5),
    }
    rows, found = [], {}
    for number, (name, (bad, share)) in enumerate(cases.items()):
        outcome = simulate(
            CHAMPION, bad, canaries=canaries, judgements=judgements, every=every, share=share, seed=number
        )
        found[name] = outcome
        rows.append(
            {
                "candidate": name,
                "taken_back": outcome.rolled_back(),
                "median_judgements": _finite(outcome.judgements()),
                "promoted": outcome.promoted(),
                "median_judgements_until_promotion": _finite(outcome.until_promotion()),
            }
        )
    table(
        ("candidate", "taken back", "after", "promoted", "after"),
        [[value if value is not None else "-" for value in row.values()] for row in rows],
    )
    return {
        "false_rollback": found["equal"].rolled_back(),
        "promoted_harm5": found["worse by 5 points"].promoted(),
        "median_judgements_harm5": _finite(found["worse by 5 points"].judgements()),
        "median_judgements_harm10": _finite(found["worse by 10 points"].judgements()),
        "canaries": canaries,
        "judgements": judgements,
        "judgements_between_looks": every,
        "champion_thumbs_down": CHAMPION,
        "table": rows,
    }


def _finite(value: float) -> int | None:
    """None: more than half of the canaries never got there."""
    return int(value) if np.isfinite(value) else None


def main() -> None:
    parser = command_line(__doc__, "canary")
    parser.add_argument("--canaries", type=int, default=2000)
    parser.add_argument("--judgements", type=int, default=10_000, help="at which each ends")
    parser.add_argument("--every", type=int, default=10, help="judgements between two looks")
    arguments = parser.parse_args()
    figures = measure(arguments.canaries, arguments.judgements, arguments.every)
    write(figures | heading(1, "numpy"), arguments.out)


if __name__ == "__main__":
    main()
