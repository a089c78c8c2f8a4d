"""Gate: the reward model is right often enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from steersman.gates.registry import Finding, Gate, gate, not_measured

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("reward_accuracy")
class AccuracyGate(Gate):
    """Least held-out accuracy of the reward model."""

    main = "least"

    least: Annotated[float, Field(ge=0, le=1)]
    """Of the estimate, or with `certain` of the lower end of its interval."""
    certain: bool = False
    """The interval decides."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        from steersman.statistics import wilson_interval

        model = evaluation.reward_model
        if model is None:
            return [not_measured("rewardAccuracy", "no reward model was measured on held-out comparisons")]
        found = wilson_interval(model.accuracy * len(model.pairs), len(model.pairs))
        value = found.low if self.certain else found.estimate
        text = f"the reward model's accuracy is {'at least ' if self.certain else ''}{value:.3f}"
        return [Finding("rewardAccuracy", value >= self.least, f"{text}, {self.least} is asked for")]
