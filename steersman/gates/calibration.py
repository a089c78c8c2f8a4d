"""Gate: the reward model knows how sure it may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from steersman.gates.registry import Finding, Gate, gate, not_measured

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("calibration")
class CalibrationGate(Gate):
    """Largest expected calibration error of the reward model on held-out comparisons."""

    main = "most"

    most: Annotated[float, Field(ge=0, le=1)]
    """Of the error."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        model = evaluation.reward_model
        if model is None or len(model.pairs) < 2:
            return [not_measured("calibration", "no reward model was measured on held-out comparisons")]
        error = model.calibration_error
        text = f"the reward model's calibration error is {error:.3f}, at most {self.most:g} is allowed"
        return [Finding("calibration", error <= self.most, text)]
