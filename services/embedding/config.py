"""Configuration of the embedding service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from steersman.config.base import FrozenModel
from steersman.rpc.server import ServerConfig


class EmbeddingOptions(FrozenModel):
    pooling: Literal["mean", "first", "last"] = "mean"
    """What stands for a text: the mean of its tokens' states, or that of its first or last token."""
    normalize: bool = True
    """Every vector has length 1, so that a product of two is their cosine."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights."""
    batch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Tokens of a forward pass."""


class EmbeddingConfig(ServerConfig, EmbeddingOptions):
    model: str
    """Folder of an encoder or a decoder, whose trunk is taken; or the embedded default's name."""
    port: Annotated[int, Field(ge=0, le=65535)] = 50055
    """EmbeddingService."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
