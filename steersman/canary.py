"""What may be said of a candidate beside its champion: take it back, let it pass, or wait. Pure.

Tests (`steersman/sequential.py`) are kept from look to look. Of a hundred candidates that are as good as their
champion, five at most are ever taken back, however often and long one looks: `FALSE_ALARMS`, shared by the signals. Of
a hundred candidates that are worse by `maxThumbsDownIncrease` or more, five at most are ever found harmless: `MISSES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steersman.config.base import FrozenModel
from steersman.config.manifest import Canary
from steersman.sequential import Counts, Difference, Level, Number, Test, capital, gain, restart, threshold

FALSE_ALARMS = {"judgements": 0.046, "errors": 0.002, "latency": 0.002}
"""Probability that a candidate that is no worse is ever taken back, by signal; 5% together."""
MISSES = 0.05
"""Probability that a candidate with the harm that may not be is ever called harmless."""


OUR_FAULT = ("InternalError", "UnavailableError", "DeadlineError", "StorageError", "SteersmanError")
"""Outcomes of an answer that count as errors; what a caller did wrong does not."""

Buckets = Sequence[tuple[float, float]]
"""Upper edges in seconds and the number of answers up to each, rising; the last edge is infinite."""


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


def count_up_to(buckets: Buckets, seconds: float) -> float:
    """Answers that took at most `seconds`, linear inside a bucket."""
    before = (0.0, 0.0)
    for edge, count in buckets:
        if seconds <= edge:
            width = edge - before[0]
            part = (seconds - before[0]) / width if math.isfinite(width) and width > 0 else 0.0
            return before[1] + part * (count - before[1])
        before = (edge, count)
    return before[1]


def median(buckets: Buckets) -> float | None:
    """As `histogram_quantile(0.5, ...)`; None without answers, or where it lies beyond the last finite edge."""
    half = buckets[-1][1] / 2 if buckets else 0.0
    before = (0.0, 0.0)
    for edge, count in buckets:
        if half and count >= half:
            share = (half - before[1]) / (count - before[1])
            return before[0] + share * (edge - before[0]) if math.isfinite(edge) else None
        before = (edge, count)
    return None


def arm_of(judged: float, bad: float, requests: float, errors: float, times: Buckets, limit: float | None) -> Arm:
    """What one variant has shown.

    Args:
        judged, bad: units with a verdict, and with a bad one.
        requests, errors: answers, and those that failed on our side.
        times: seconds to the end of its answers.
        limit: seconds beyond which an answer is slow; None: unknown, then no answer counts as timed.
    """
    timed = times[-1][1] if times and limit is not None else 0.0
    slow = timed - count_up_to(times, limit) if limit is not None and timed else 0.0
    return Arm(judged=judged, bad=bad, requests=requests, errors=min(errors, requests), timed=timed, slow=slow)


class Evidence(FrozenModel):
    """What has been weighed so far: counts up to the last look, and logarithms of e-processes."""

    champion: Arm = Arm()
    """What the champion showed."""
    candidate: Arm = Arm()
    """What the candidate showed."""
    looks: int = 0
    """Looks that saw something new."""
    harm: float = 0.0
    """Against 'people are at least as content as with the champion'."""
    bound: float = 0.0
    """Against 'people are less content by maxThumbsDownIncrease or more'."""
    errors: float = 0.0
    """Against 'at most maxErrorRate of the requests fail', when it is a little more."""
    many_errors: float = 0.0
    """The same, when it is much more."""
    more_errors: float = 0.0
    """Against 'no more requests fail than with the champion'."""
    slow: float = 0.0
    """Against 'the median latency is at most maxLatencyRatio times the champion's', when it is a little more."""
    very_slow: float = 0.0
    """The same, when it is much more."""


Weighed = tuple[Test, str, str]
"""A test, and the fields of `Arm` with its observations and with the bad ones of them."""


def tests(limits: Canary) -> dict[str, Weighed]:
    """By field of `Evidence`."""
    harm = min(limits.max_thumbs_down_increase, 0.999)
    rate = min(limits.max_error_rate, 0.4) + 1e-4
    return {
        "harm": (Difference(0.0, start=0.085, low=0.04, high=0.5), "judged", "bad"),
        "bound": (Difference(harm, start=0.0, low=-0.5, high=0.5 * harm), "judged", "bad"),
        "errors": (Level(rate, 1.5 * rate + 0.005), "requests", "errors"),
        "many_errors": (Level(rate, min(5 * rate + 0.1, 0.9)), "requests", "errors"),
        "more_errors": (
            Difference(0.0, start=0.03, low=0.03, high=0.03, prior=(0.5, 49.5)),
            "requests",
            "errors",
        ),
        "slow": (Level(0.5, 0.58), "timed", "slow"),
        "very_slow": (Level(0.5, 0.85), "timed", "slow"),
    }


_MAY_BREAK_LATER = ("errors", "many_errors", "more_errors", "slow", "very_slow")
"""A model stays what it is, but a service may break after a good hour."""


def advance(
    logs: Mapping[str, Number],
    looks: int,
    before: tuple[Mapping[str, Number], Mapping[str, Number]],
    after: tuple[Mapping[str, Number], Mapping[str, Number]],
    limits: Canary,
) -> dict[str, Number]:
    """The logarithms of `Evidence` after one more look.

    Args:
        logs: those after `looks` looks.
        before, after: fields of `Arm` of champion and candidate, at the last look and at this one.
    """
    found = {}
    for name, (test, all_of, bad_of) in tests(limits).items():
        first, second = (
            (Counts(champion[all_of], champion[bad_of]), Counts(candidate[all_of], candidate[bad_of]))
            for champion, candidate in (before, after)
        )
        gained = gain(test, first, second)
        if name == "more_errors":
            # With all traffic on the candidate the limit alone decides.
            limit = gain(tests(limits)["errors"][0], first, second)
            gained = np.where(second[0].n <= first[0].n, limit, gained)
        found[name] = restart(logs[name], looks, gained) if name in _MAY_BREAK_LATER else logs[name] + gained
    return found


def findings(logs: Mapping[str, Number], looks: int, limits: Canary) -> dict[str, Number]:
    """What the logarithms of `Evidence` say: `errors`, `latency` and `judgements` speak against the candidate;
    `harmless`: a harm of `maxThumbsDownIncrease` is refuted."""
    value = {name: capital(logs[name], looks) for name in _MAY_BREAK_LATER}
    too_many = np.logaddexp(value["errors"], value["many_errors"]) - np.log(2.0)
    too_slow = np.logaddexp(value["slow"], value["very_slow"]) - np.log(2.0)
    return {
        "errors": np.minimum(too_many, value["more_errors"]) >= threshold(FALSE_ALARMS["errors"]),
        "latency": too_slow >= threshold(FALSE_ALARMS["latency"]),
        "judgements": logs["harm"] >= threshold(FALSE_ALARMS["judgements"]),
        "harmless": (logs["bound"] >= threshold(MISSES)) | (limits.max_thumbs_down_increase >= 1),
    }


def weigh(evidence: Evidence, champion: Arm, candidate: Arm, limits: Canary) -> Evidence:
    """Adds what was observed since the last look; the same counts twice change nothing."""
    if (champion, candidate) == (evidence.champion, evidence.candidate):
        return evidence
    old = evidence.model_dump()
    before = (evidence.champion.model_dump(), evidence.candidate.model_dump())
    logs = advance(old, evidence.looks, before, (champion.model_dump(), candidate.model_dump()), limits)
    rounded = {name: round(float(value), 6) for name, value in logs.items()}
    return Evidence(champion=champion, candidate=candidate, looks=evidence.looks + 1, **rounded)


@dataclass(frozen=True)
class CanaryVerdict:
    against: str | None
    """Why the candidate must be taken back; None: nothing speaks against it."""
    harmless: bool
    """A harm of `maxThumbsDownIncrease` is refuted."""


def decide(evidence: Evidence, limits: Canary) -> CanaryVerdict:
    """What the evidence allows to say."""
    candidate, champion = evidence.candidate, evidence.champion
    found = findings(evidence.model_dump(), evidence.looks, limits)
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
    return CanaryVerdict(against, against is None and bool(found["harmless"]))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
