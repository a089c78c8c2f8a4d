"""Gate: nothing is forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from steersman.gates.registry import Against, Finding, Gate, gate, no_opponent, not_measured, opponent

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("knowledge")
class KnowledgeGate(Gate):
    """Largest drop in every task of knowledge: the lower end of the difference's interval must lie above it."""

    main = "drop"

    drop: Annotated[float, Field(gt=0, le=1)] = 0.03
    """Share that may be lost."""
    equivalent: bool = False
    """Ask for equivalence: two one-sided tests that neither more than `drop` is lost nor gained."""
    against: Against = "base"
    """The model before."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        from steersman.inference import equivalence

        before = opponent(evaluation, self.against)
        if before is None:
            return [no_opponent("knowledge", self.against)]
        if not evaluation.knowledge:
            return [not_measured("knowledge", "the evaluation has no tasks of knowledge")]
        found = []
        for task, scores in evaluation.knowledge.items():
            if not {before, evaluation.aligned} <= scores.keys():
                found.append(not_measured(f"knowledge.{task}", f"{task} was not asked of both models"))
                continue
            result = equivalence(scores[before], scores[evaluation.aligned], self.drop)
            low, high = result.difference.low, result.difference.high
            passed = result.equivalent if self.equivalent else low > -self.drop
            text = f"{task} changes by {result.difference.estimate:+.1%} ({low:+.1%} to {high:+.1%}) against {before}, "
            text += f"{'±' if self.equivalent else '-'}{self.drop:.1%} is the bound"
            found.append(Finding(f"knowledge.{task}", passed, text))
        return found
