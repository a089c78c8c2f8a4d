"""What may be said of a candidate beside its champion: take it back, let it pass, or wait. Pure.

Five tests (`steersman/sequential.py`) are kept from look to look. Of a hundred candidates that are as good as their
champion, five at most are ever taken back, however often and long one looks: `FALSE_ALARMS`, shared by the signals. Of
a hundred candidates that are worse by `maxThumbsDownIncrease` or more, five at most are ever found harmless: `MISSES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from steersman.config.base import FrozenModel
from steersman.config.manifest import Canary
from steersman.sequential import Counts, Difference, Level, Number, Test, gain, threshold

FALSE_ALARMS = {"judgements": 0.046, "errors": 0.002, "latency": 0.002}
"""Probability that a candidate that is no worse is ever taken back, by signal; 5% together."""
MISSES = 0.05
"""Probability that a candidate with the harm that may not be is ever called harmless."""


class Arm(FrozenModel):
    """What one variant has shown since the candidate was ready; fractions, because Prometheus extrapolates."""

    judged: float = 0.0
    """Conversations or customers that were judged; each counts once."""
    bad: float = 0.0
    """Those of them with a thumb down."""
    requests: float = 0.0
    """Answered requests, failed ones included."""
    errors: float = 0.0
    """Requests that failed on our side."""
    timed: float = 0.0
    """Answers whose time is known."""
    slow: float = 0.0
    """Those that took longer than `maxLatencyRatio` times the champion's median."""


class Evidence(FrozenModel):
    """What has been weighed so far: counts up to the last look, and the logarithms of the e-processes."""

    champion: Arm = Arm()
    """What the champion showed."""
    candidate: Arm = Arm()
    """What the candidate showed."""
    harm: float = 0.0
    """Against 'people are at least as content as with the champion'."""
    bound: float = 0.0
    """Against 'people are less content by maxThumbsDownIncrease or more'."""
    errors: float = 0.0
    """Against 'at most maxErrorRate of the requests fail'."""
    more_errors: float = 0.0
    """Against 'no more requests fail than with the champion'."""
    slow: float = 0.0
    """Against 'the median latency is at most maxLatencyRatio times the champion's'."""


def tests(limits: Canary) -> dict[str, tuple[Test, str, str]]:
    """By field of `Evidence`: the test, and the fields of `Arm` with its observations and the bad ones of them."""
    harm = min(limits.max_thumbs_down_increase, 0.999)
    rate = min(limits.max_error_rate, 0.4)
    return {
        "harm": (Difference(0.0, start=0.085, low=0.04, high=0.5), "judged", "bad"),
        "bound": (Difference(harm, start=0.0, low=-0.5, high=0.5 * harm), "judged", "bad"),
        "errors": (Level(rate, 2 * rate + 0.01, 1.25 * rate + 0.002, 0.99), "requests", "errors"),
        "more_errors": (Difference(0.0, start=0.02, low=0.005, high=0.9, prior=(0.5, 49.5)), "requests", "errors"),
        "slow": (Level(0.5, 0.65, 0.55, 0.99), "timed", "slow"),
    }


def gains(
    before: tuple[Mapping[str, Number], Mapping[str, Number]],
    after: tuple[Mapping[str, Number], Mapping[str, Number]],
    limits: Canary,
) -> dict[str, Number]:
    """What the observations between two looks add to each logarithm of `Evidence`.

    Args:
        before, after: fields of `Arm` of champion and candidate.
    """
    found = {}
    for name, (test, all_of, bad_of) in tests(limits).items():
        first, second = (
            (Counts(champion[all_of], champion[bad_of]), Counts(candidate[all_of], candidate[bad_of]))
            for champion, candidate in (before, after)
        )
        found[name] = gain(test, first, second)
    return found


def findings(logs: Mapping[str, Number], limits: Canary) -> dict[str, Number]:
    """What the logarithms of `Evidence` say: `errors`, `latency` and `judgements` speak against the candidate;
    `harmless`: a harm of `maxThumbsDownIncrease` is refuted."""
    both = np.minimum(logs["errors"], logs["more_errors"])
    return {
        "errors": both >= threshold(FALSE_ALARMS["errors"]),
        "latency": logs["slow"] >= threshold(FALSE_ALARMS["latency"]),
        "judgements": logs["harm"] >= threshold(FALSE_ALARMS["judgements"]),
        "harmless": (logs["bound"] >= threshold(MISSES)) | (limits.max_thumbs_down_increase >= 1),
    }


def weigh(evidence: Evidence, champion: Arm, candidate: Arm, limits: Canary) -> Evidence:
    """Adds what was observed since the last look; the same counts twice change nothing."""
    before = (evidence.champion.model_dump(), evidence.candidate.model_dump())
    added = gains(before, (champion.model_dump(), candidate.model_dump()), limits)
    logs = {name: round(getattr(evidence, name) + float(value), 6) for name, value in added.items()}
    return Evidence(champion=champion, candidate=candidate, **logs)


@dataclass(frozen=True)
class Verdict:
    against: str | None
    """Why the candidate must be taken back; None: nothing speaks against it."""
    harmless: bool
    """A harm of `maxThumbsDownIncrease` is refuted."""


def decide(evidence: Evidence, limits: Canary) -> Verdict:
    """What the evidence allows to say."""
    candidate, champion = evidence.candidate, evidence.champion
    found = findings(evidence.model_dump(), limits)
    against = None
    if found["errors"]:
        against = (
            f"{_share(candidate.errors, candidate.requests):.1%} of the requests failed, more than "
            f"{limits.max_error_rate:.1%} and than the champion's {_share(champion.errors, champion.requests):.1%}"
        )
    elif found["latency"]:
        against = (
            f"{_share(candidate.slow, candidate.timed):.1%} of the answers took longer than "
            f"{limits.max_latency_ratio:g} times the champion's median"
        )
    elif found["judgements"]:
        against = (
            f"thumbs down in {_share(candidate.bad, candidate.judged):.1%} of {candidate.judged:.0f} judged "
            f"conversations, {_share(champion.bad, champion.judged):.1%} of {champion.judged:.0f} with the champion"
        )
    return Verdict(against, against is None and bool(found["harmless"]))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
