"""Gate: it wins more often than it loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steersman.gates.registry import Against, Finding, Gate, gate, no_opponent, not_measured, opponent

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("win_rate")
class WinRateGate(Gate):
    """Least share of comparisons that are won (ties count half): the lower end of the interval over prompts."""

    main = "least"

    least: float = 0.5
    """Of the lower end."""
    against: Against = "start"
    """The model before."""
    judge: str = "reward"
    """Who compares: `reward`, or the name of one of the evaluation's judges."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        from steersman.report.wins import win_rate

        before = opponent(evaluation, self.against)
        if before is None:
            return [no_opponent("winRate", self.against)]
        duels = evaluation.duels(self.judge)
        if not any({duel.one, duel.other} == {before, evaluation.aligned} for duel in duels):
            return [not_measured("winRate", f"{self.judge} compared {evaluation.aligned} and {before} on no prompt")]
        rate = win_rate(duels, evaluation.aligned, before).rate
        text = f"it wins at least {rate.low:.1%} of the comparisons with {before}, {self.least:.1%} are asked for"
        return [Finding("winRate", rate.low >= self.least, text)]
