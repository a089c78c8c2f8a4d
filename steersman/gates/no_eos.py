"""Gate: answers end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from steersman.gates.registry import Finding, Gate, gate

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("no_eos")
class NoEosGate(Gate):
    """Largest share of answers that are cut instead of ended."""

    main = "most"

    most: Annotated[float, Field(ge=0, le=1)]
    """Of the answers."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        samples = evaluation.models[evaluation.aligned]
        share = sum(sample.finish_reason != "stop" for sample in samples) / len(samples)
        text = f"{share:.1%} of the answers do not end, at most {self.most:.1%} may"
        return [Finding("noEos", share <= self.most, text)]
