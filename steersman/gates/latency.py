"""Gate: answers come in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from steersman.gates.registry import Finding, Gate, gate, not_measured

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("latency")
class LatencyGate(Gate):
    """Largest mean seconds of a suite's conversation: the upper end of the interval over cases."""

    main = "most"

    most: Annotated[float, Field(gt=0)]
    """Seconds."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        from steersman.statistics import mean_interval

        results = [result for result in evaluation.suites if result.target == evaluation.aligned]
        asked = [(f"{r.suite} {one.case}", one.seconds) for r in results for one in r.asked if one.error is None]
        if len({case for case, _ in asked}) < 2:
            return [not_measured("latency", "no suite was asked, of whose answers the time is taken")]
        high = mean_interval([seconds for _, seconds in asked], clusters=[case for case, _ in asked]).high
        text = f"a conversation takes up to {high:.2f} s in the mean, at most {self.most:g} s are allowed"
        return [Finding("latency", high <= self.most, text)]
