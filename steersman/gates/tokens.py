"""Gate: answers do not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from steersman.gates.registry import Against, Finding, Gate, gate, no_opponent, opponent

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation


@gate("tokens")
class TokensGate(Gate):
    """Largest mean number of tokens an answer: the upper end of the interval."""

    main = "most"

    most: Annotated[float, Field(gt=0)] | None = None
    """Tokens; None: only `mostRatio` counts."""
    most_ratio: Annotated[float, Field(gt=0)] | None = None
    """Of the model before: 1.3 lets answers grow by 30%."""
    against: Against = "start"
    """The model before."""

    def check(self, evaluation: Evaluation) -> list[Finding]:
        from steersman.report.schema import prompt_of
        from steersman.statistics import compare, mean_interval

        lengths = {name: {s.prompt_id: float(s.length) for s in samples} for name, samples in evaluation.models.items()}
        after = lengths[evaluation.aligned]
        clusters = list(map(prompt_of, after))
        found = []
        if self.most is not None:
            high = mean_interval(list(after.values()), clusters=clusters).high
            text = f"an answer has up to {high:.1f} tokens in the mean, at most {self.most:g} are allowed"
            found.append(Finding("tokens", high <= self.most, text))
        if self.most_ratio is not None:
            name = opponent(evaluation, self.against)
            if name is None:
                return [*found, no_opponent("tokens", self.against)]
            before = [lengths[name][key] for key in after]
            mean = sum(before) / len(before)
            high = compare(before, list(after.values()), clusters=clusters).difference.high
            ratio = 1 + high / max(mean, 1.0)
            text = f"answers are up to {ratio:.2f} times as long as those of {name}, {self.most_ratio:g} is allowed"
            found.append(Finding("tokens", ratio <= self.most_ratio, text))
        return found
