"""The figures of suites: shares by tag and check, and what changed against another result.

Cases are the units: several samples of a case are one piece of evidence (their mean). The interval of a share is
Wilson's with as many observations as there are cases, which is too wide rather than too narrow where samples of a case
disagree: the variance of case means is at most that of yes and no.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from steersman.errors import DataError
from steersman.inference import sign_test
from steersman.statistics import Interval, compare, wilson_interval
from steersman.suites.asked import Asked, SuiteResult


class Line(NamedTuple):
    """A share of passed cases."""

    name: str
    share: Interval
    cases: int
    before: Interval | None = None
    """The share in the result that this one is compared with."""


class Change(NamedTuple):
    """One result against another, over the cases that both have."""

    difference: Interval | None
    """Of the shares, paired by case; None with fewer than two common cases."""
    p_value: float
    """Exact sign test over cases that changed (with one sample: McNemar's)."""
    common: int
    worse: tuple[str, ...]
    """Cases that pass less often."""
    better: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]


def share(result: SuiteResult, tag: str | None = None, check: str | None = None) -> Interval:
    """Share of passed cases with Wilson's interval over cases."""
    scores = result.scores_of(tag, check)
    if not scores:
        raise DataError(f"suite {result.suite}: no case has the tag {tag!r} or the check {check!r}")
    return wilson_interval(sum(scores.values()), len(scores))


def lines(result: SuiteResult, before: SuiteResult | None = None) -> list[Line]:
    """`all`, then every tag."""
    found = []
    for tag in (None, *result.tags):
        scores = result.scores_of(tag)
        earlier = before.scores_of(tag) if before is not None else {}
        found.append(
            Line(tag or "all cases", share(result, tag), len(scores),
                 wilson_interval(sum(earlier.values()), len(earlier)) if earlier else None)
        )  # fmt: skip
    return found


def by_check(result: SuiteResult) -> list[Line]:
    return [Line(name, share(result, check=name), len(result.scores_of(check=name))) for name in result.checks]


def change(before: SuiteResult, after: SuiteResult) -> Change:
    """What changed from one result of a suite to another.

    Raises:
        DataError: they are of different suites.
    """
    if before.suite != after.suite:
        raise DataError(f"{before.suite} and {after.suite} are different suites; compare results of one")
    old, new = before.scores, after.scores
    common = [case for case in new if case in old]
    first, second = [old[case] for case in common], [new[case] for case in common]
    return Change(
        difference=compare(first, second).difference if len(common) > 1 else None,
        p_value=sign_test(first, second),
        common=len(common),
        worse=tuple(case for case in common if new[case] < old[case]),
        better=tuple(case for case in common if new[case] > old[case]),
        added=tuple(case for case in new if case not in old),
        removed=tuple(case for case in old if case not in new),
    )


def earlier_of(result: SuiteResult, earlier: Sequence[SuiteResult]) -> SuiteResult | None:
    """The earlier result that this one is a newer version of: same suite and decoding, if possible same target."""
    same = [one for one in earlier if (one.suite, one.decoding) == (result.suite, result.decoding)]
    return next((one for one in same if one.target == result.target), same[0] if len(same) == 1 else None)


def failures(result: SuiteResult) -> list[Asked]:
    """Samples that did not pass, in the suite's order."""
    return [one for one in result.asked if not one.passed]
