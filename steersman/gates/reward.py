"""Gate: the reward rises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steersman.gates.registry import Against, Finding, Gate, gate, no_opponent, opponent

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("reward")
class RewardGate(Gate):
    """Least gain in reward over SFT: the lower end of the interval of the paired difference."""

    main = "least"

    least: float = 0.0
    """Of the lower end."""
    against: Against = "start"
    """The model before."""
    scorer: str | None = None
    """One of several reward models; None: the reward that they make together."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        before = opponent(evaluation, self.against)
        if before is None:
            return [no_opponent("reward", self.against)]
        criterion = None if self.scorer is None else f"scores.{self.scorer}"
        low = evaluation.change(before, evaluation.aligned, criterion).difference.low
        what = "the reward" if self.scorer is None else f"the reward of {self.scorer}"
        text = f"{what} gains at least {low:.3f} over {before}, {self.least} is asked for"
        return [Finding("reward", low >= self.least, text)]
