"""Configuration of the reference service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from steersman.rpc.server import ServerConfig


class ReferenceConfig(ServerConfig):
    model: str
    """Folder of the frozen reference policy in Hugging Face format, or the embedded default's name."""
    model_name: str = "reference"
    """Name that the service reports."""
    port: Annotated[int, Field(ge=0, le=65535)] = 50053
    """ReferenceService."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; `auto` measures on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0: all cores."""
    batch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Tokens of a forward pass."""
    merge_requests: bool = True
    """Batch requests of several callers together; off: results are bit-equal whatever else arrives."""
