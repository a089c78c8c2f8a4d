"""Settings of vLLM: a part of the configuration, and what the engine is given. Nothing here imports vLLM."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from steersman.config.base import FrozenModel


class VllmSettings(FrozenModel):
    max_running: Annotated[int, Field(gt=0)] = 256
    """Samples generated at the same time."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that vLLM may take."""
    tensor_parallel: Annotated[int, Field(gt=0)] = 1
    """GPUs that one copy of the model is split over."""
    eager: bool = False
    """No compilation and no CUDA graphs: starts sooner, generates slower."""
    lora: Literal["auto", "adapter", "merge"] = "auto"
    """What a LoRA update becomes: an adapter of vLLM, under a new name for every version, or merged full weights.
    `auto`: an adapter on a GPU, merged on a CPU, where vLLM computes adapters 9 times slower."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    """Largest rank of an adapter."""
    check_architecture: bool = True
    """Before the model is loaded, small random ones of its architecture must give transformers' log-probabilities;
    where they give others, the service does not start."""
