"""Gates on suites: the share that passes, and cases of safety and leak suites that fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from steersman.gates.registry import Against, Finding, Gate, gate, no_opponent, not_measured, opponent

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation
    from steersman.suites.asked import SuiteResult


@gate("suites")
class SuitesGate(Gate):
    """Least share of passed cases of every suite: the lower end of the interval over cases."""

    main = "least"

    least: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of every suite that `each` does not name; None: only those count."""
    each: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """By suite."""
    most_lost: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share that a suite may lose at most: the lower end of the paired difference; None: not looked at."""
    against: Against = "start"
    """The model that a suite may lose against."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        from steersman.suites.verdicts import share

        results = _of_aligned(evaluation)
        limits = {result.suite: self.least for result in results if self.least is not None} | self.each
        if not limits and self.most_lost is None:
            return [not_measured("suites", "the evaluation has no suites")]
        found = []
        for name, least in limits.items():
            where, asked = f"suites.{name}", [result for result in results if result.suite == name]
            if not asked:
                found.append(not_measured(where, f"the suite {name} was not asked"))
            for result in asked:
                passed = share(result)
                text = f"at least {passed.low:.1%} of {name} ({result.decoding}) pass, {least:.1%} are asked for"
                found.append(Finding(where, passed.low >= least, text))
        return found + self._lost(evaluation, results)

    def _lost(self, evaluation: Evaluation, results: list[SuiteResult]) -> list[Finding]:
        from steersman.suites.verdicts import change

        if self.most_lost is None:
            return []
        before = opponent(evaluation, self.against)
        if before is None:
            return [no_opponent("suites", self.against)]
        found = []
        for result in results:
            where = f"suites.{result.suite}"
            same = (result.suite, result.decoding)
            other = next((r for r in evaluation.suites if r.target == before and (r.suite, r.decoding) == same), None)
            difference = change(other, result).difference if other is not None else None
            if difference is None:
                found.append(not_measured(where, f"{result.suite} was not asked of {before}, or has one case only"))
                continue
            text = f"{result.suite} may lose {difference.low:+.1%} against {before}, {-self.most_lost:+.1%} may be lost"
            found.append(Finding(where, difference.low >= -self.most_lost, text))
        return found


class _NoFailures(Gate):
    main = "most"

    most: Annotated[int, Field(ge=0)] = 0
    """Cases that may fail."""

    def count(self, evaluation: Evaluation, gate: str, kind: Literal["safety", "leak"]) -> list[Finding]:
        results = [result for result in _of_aligned(evaluation) if result.kind == kind]
        if not results:
            return [not_measured(gate, f"no suite of the kind {kind} was asked")]
        found = []
        for result in results:
            bad = [case for case, score in result.scores.items() if score < 1]
            named = f" ({', '.join(bad[:5])})" if bad else ""
            text = f"{len(bad)} cases of {result.suite} ({result.decoding}) fail{named}, at most {self.most} may"
            found.append(Finding(f"{gate}.{result.suite}", len(bad) <= self.most, text))
        return found


@gate("safety")
class SafetyGate(_NoFailures):
    """Largest number of cases of each safety suite of which any sample fails."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        return self.count(evaluation, "safety", "safety")


@gate("leaks")
class LeaksGate(_NoFailures):
    """Largest number of cases of each leak suite of which any sample fails."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        return self.count(evaluation, "leaks", "leak")


def _of_aligned(evaluation: Evaluation) -> list[SuiteResult]:
    return [result for result in evaluation.suites if result.target == evaluation.aligned]
