"""Direct preference optimization."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from steersman.config.base import PositiveFloat
from steersman.config.kinds.registry import stage
from steersman.config.kinds.supervised import Optimizer, SupervisedStage


@stage("dpo")
class DpoStage(SupervisedStage):
    """Direct preference optimization through TRL (Rafailov et al. 2023) and its variants."""

    title = "Direct preference optimization."
    runner = "training.offline.dpo:run_dpo"
    reads = "preferences"
    trains_policy = shared_by_ranks = True

    loss: Literal["sigmoid", "ipo", "robust", "hinge"] = "sigmoid"
    """TRL's `loss_type`."""
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of flipped labels that `robust` assumes."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-4)
    """AdamW."""

    @model_validator(mode="after")
    def _check(self) -> DpoStage:
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss robust needs the share of wrong labels; set labelSmoothing above 0")
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
            raise ValueError(f"labelSmoothing has no meaning for the loss {self.loss}; remove it")
        return self
