"""Gate: no criterion of the rubric falls, or each of them rises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steersman.gates.registry import Against, Finding, Gate, gate, no_opponent, not_measured, opponent

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("criteria")
class CriteriaGate(Gate):
    """Least change of every criterion of the rubric: the lower end of the interval; -0.1 lets none lose more."""

    main = "least"

    least: float | None = None
    """Of every criterion that `each` does not name; None: only those count."""
    each: dict[str, float] = {}
    """By criterion, `total` included."""
    against: Against = "start"
    """The model before."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        from steersman.errors import meant
        from steersman.report.summary import criteria, label

        before = opponent(evaluation, self.against)
        if before is None:
            return [no_opponent("criteria", self.against)]
        known = criteria(evaluation)
        limits = {name: self.least for name in known if self.least is not None} | self.each
        if not limits:
            return [not_measured("criteria", "the evaluation has no checks with criteria")]
        found = []
        for name, least in limits.items():
            where = f"criteria.{name}"
            if name not in (*known, "total") or not known:
                there = ["total", *known] if known else []
                said = f"the rubric has no criterion {name}, only {', '.join(there) or 'none'}{meant(name, there)}"
                found.append(not_measured(where, said))
                continue
            change = evaluation.change(before, evaluation.aligned, name).difference
            text = f"{label(name)} changes by {change.estimate:+.3f} and may lose {change.low:+.3f} against {before}, "
            found.append(Finding(where, change.low >= least, text + f"at least {least:+g} is asked for"))
        return found
