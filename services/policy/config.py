"""Configuration of the policy service."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from services.embedding.config import EmbeddingOptions
from steersman.config.base import FrozenModel
from steersman.rpc.server import ServerConfig


class VllmOptions(FrozenModel):
    """Only for the engine `vllm`."""

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
    `auto`: an adapter on a GPU, merged on a CPU."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    """Largest rank of an adapter."""


class PolicyConfig(ServerConfig):
    model: str
    """Folder of the base model in Hugging Face format, or the embedded default's name."""
    model_name: str = "policy"
    """Name that the service reports."""
    template_options: dict[str, Any] = {}
    """Variables of the chat template, for example `{"enable_thinking": false}`, beside those saved with the model."""
    engine: Literal["transformers", "vllm", "tgi"] = "transformers"
    """What generates."""
    engine_url: str | None = None
    """Address of the server behind the engine `tgi`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    """Data plane: PolicyService."""
    weights_port: Annotated[int, Field(ge=0, le=65535)] | None = 50054
    """Control plane: WeightsService, on a listener of its own; None: nobody publishes weights to this service."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; `auto` measures on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0: all cores."""
    max_context: Annotated[int, Field(gt=0)] | None = None
    """Longest prompt plus answer; None: the model's."""
    kv_cache_tokens: Annotated[int, Field(gt=0)] = 16_384
    """Tokens that the KV cache holds; samples beyond it wait."""
    prefix_tokens: Annotated[int, Field(ge=0)] = 4_096
    """Tokens of ended conversations that the engine `transformers` remembers beside that, so that their next turn
    computes only what is new; 0: none."""
    lookahead: bool = True
    """Whether the engine `transformers` drafts a single chat's answer on a CPU from the words in it."""
    vllm: VllmOptions = VllmOptions()
    """Settings of the engine `vllm`."""
    embeddings: EmbeddingOptions | None = None
    """Serve vectors of texts beside answers, by the trunk of `model` as it is in its folder: they stay comparable
    while weights are published, and cost the memory of a second copy. None: not."""
    max_upload_bytes: Annotated[int, Field(gt=0)] = 64 * 1024**3
    """Largest weights payload that is accepted."""
    artifact_urls: list[str] = []
    """Prefixes of the URLs from which weights may be read; empty: none."""
