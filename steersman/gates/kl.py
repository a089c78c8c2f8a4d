"""Gate: the KL budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from steersman.gates.registry import Finding, Gate, gate, not_measured

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("kl")
class KlGate(Gate):
    """Largest mean KL to the reference in nats an answer: the upper end of the interval."""

    main = "most"

    most: Annotated[float, Field(gt=0)]
    """Of the upper end."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        from steersman.report.schema import prompt_of
        from steersman.statistics import mean_interval

        values = {s.prompt_id: s.kl for s in evaluation.models[evaluation.aligned] if s.kl is not None}
        if len({prompt_of(key) for key in values}) < 2:
            return [not_measured("kl", "the KL to the reference was measured on fewer than two prompts")]
        high = mean_interval(list(values.values()), clusters=list(map(prompt_of, values))).high
        return [Finding("kl", high <= self.most, f"the KL is up to {high:.2f} nats, at most {self.most:g} are allowed")]
