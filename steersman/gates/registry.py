"""The registry of gates: every file beside this one adds one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from steersman.documents import FrozenModel

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation

Against = Literal["start", "base", "sft", "champion"]
"""Which model: the one that alignment started from, the base model, SFT's, or the one that is served now."""
GATES: dict[str, type[Gate]] = {}
"""By the name of the manifest's field, in snake case."""


@dataclass(frozen=True)
class Finding:
    """What a gate found."""

    gate: str
    """Name in the manifest, with what it looked at where there are several: `criteria.polite`."""
    passed: bool
    text: str
    """The figures in a sentence."""


class Gate(FrozenModel):
    """Options of one gate, and its check."""

    main: ClassVar[str]
    """The option that a bare number stands for."""

    @model_validator(mode="before")
    @classmethod
    def _bare_number(cls, data: Any) -> Any:
        return {cls.main: data} if isinstance(data, int | float) and not isinstance(data, bool) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "number"}, handler(core)]}

    @abstractmethod
    def check(self, evaluation: Evaluation) -> list[Finding]:
        """One finding or several; what was not measured is not passed."""


def gate(name: str) -> Any:
    """Registers a class of options under the name of its field in the manifest, in snake case."""

    def add(cls: type[Gate]) -> type[Gate]:
        GATES[name] = cls
        return cls

    return add


def opponent(evaluation: Evaluation, against: Against) -> str | None:
    """Name of the model that the aligned one is compared with; None: it was not evaluated."""
    if against == "start":
        return evaluation.start if evaluation.start != evaluation.aligned else None
    return against if against in evaluation.models and against != evaluation.aligned else None


def not_measured(gate: str, what: str) -> Finding:
    return Finding(gate, False, f"{what}, so the gate {gate} cannot pass")


def no_opponent(gate: str, against: Against) -> Finding:
    return not_measured(gate, f"there is no model to compare with ({against} was not evaluated beside the aligned one)")


def failed(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.passed]
