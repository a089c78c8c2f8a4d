"""The manifest's block `gates`, which follows from the registry, and its check."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, create_model

from steersman.documents import FrozenModel
from steersman.gates.registry import GATES, Finding, Gate

if TYPE_CHECKING:
    from steersman.report.schema import Evaluation

for _module in (
    "reward", "win_rate", "criteria", "suites", "kl", "knowledge", "accuracy", "calibration", "no_eos", "tokens",
    "latency",
):  # fmt: skip
    importlib.import_module(f"steersman.gates.{_module}")


def _fields() -> dict[str, Any]:
    return {
        name: (Annotated[options | None, Field(description=" ".join((options.__doc__ or "").split()))], None)
        for name, options in GATES.items()
    }


class _Block(FrozenModel):
    def __bool__(self) -> bool:
        return any(getattr(self, name) is not None for name in type(self).model_fields)


if TYPE_CHECKING:

    class Gates(_Block):
        pass
else:
    Gates = create_model("Gates", __base__=_Block, **_fields())
"""One field for every gate."""


def check_gates(gates: Gates, evaluation: Evaluation) -> list[Finding]:
    """What every gate of the manifest found."""
    found: list[Finding] = []
    for name in GATES:
        options: Gate | None = getattr(gates, name, None)
        if options is not None:
            found += options.check(evaluation)
    return found
