"""What stages have in common that learn from rows of a file."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from steersman.config.base import FrozenModel, NonNegativeFloat, Positive, PositiveFloat
from steersman.config.kinds.registry import Place, StageOptions


class Lora(FrozenModel):
    """Low-rank adaptation (Hu et al. 2021) through PEFT."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """Scale of the update: alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the first factor. Keep 0 for reinforcement learning."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter: `all-linear`, a list of how their names end, or a regular expression of whole names
    (`.*layers[.]2[0-9][.].*_proj`: those of the layers 20 to 29)."""
    use_dora: bool = False
    """Weight-decomposed adaptation (DoRA, Liu et al. 2024)."""
    quantize: Literal["nf4"] | None = None
    """QLoRA: the frozen weights in 4 bits (needs a CUDA device and bitsandbytes)."""

    @field_validator("target_modules")
    @classmethod
    def _names_layers(cls, given: str | list[str]) -> str | list[str]:
        if not given:
            raise ValueError("names no layer; use all-linear, or null instead of lora to train all weights")
        if isinstance(given, str):
            try:
                re.compile(given)
            except re.error as error:
                raise ValueError(f"{given!r} is no regular expression ({error}); use all-linear or a list") from None
        return given


class Optimizer(FrozenModel):
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps that warm up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping by global norm."""


class SupervisedStage(StageOptions):
    """What every stage that TRL trains on rows of a data file has in common."""

    lora: Lora | None = Lora()
    """None (`null`): full fine-tuning."""
    optimizer: Optimizer = Optimizer(learning_rate=2e-4)
    """AdamW."""
    epochs: PositiveFloat = 1.0
    """Passes over the data."""
    max_steps: Positive | None = None
    """Ends earlier."""
    batch_size: Positive = 16
    """Rows an optimizer step."""
    micro_batch_size: Positive = 8
    """Rows a forward pass."""
    max_length: Positive = 1024
    """Longer conversations are refused, never cut silently."""
    gradient_checkpointing: bool = False
    """Trades time for memory."""

    def steps_on(self, rows: int) -> int | None:
        a_pass = -(-rows // self.batch_size)
        return self.max_steps or max(1, math.ceil(self.epochs * a_pass))

    def check_place(self, place: Place) -> None:
        if self.batch_size % place.workers:
            raise ValueError(
                f"{self.shown(place)} has batchSize {self.batch_size}, which {place.workers} trainer.workers cannot "
                "share; make it a multiple"
            )
