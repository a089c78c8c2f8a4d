"""Configuration of the policy service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from services.embedding.config import EmbeddingOptions
from services.policy.engine_kinds import ENGINES
from steersman.rpc.server import ServerConfig


def _engines() -> dict[str, Any]:
    """`engine`, and a block of options for every engine that has some."""
    names = Literal[tuple(ENGINES)]  # type: ignore[valid-type]
    fields: dict[str, Any] = {"engine": (Annotated[names, Field(description="What generates.")], "transformers")}
    for name, options in ENGINES.items():
        if options.model_fields:
            text = f"Settings of the engine `{name}`."
            fields[name] = (Annotated[options, Field(description=text)], options())
    return fields


if TYPE_CHECKING:

    class _ChosenEngine(ServerConfig):
        engine: str = "transformers"
else:
    _ChosenEngine = create_model("_ChosenEngine", __base__=ServerConfig, **_engines())


class PolicyConfig(_ChosenEngine):
    model: str
    """Folder of the base model in Hugging Face format, or the embedded default's name."""
    model_name: str = "policy"
    """Name that the service reports."""
    template_options: dict[str, Any] = {}
    """Variables of the chat template, for example `{"enable_thinking": false}`, beside those saved with the model."""
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
    embeddings: EmbeddingOptions | None = None
    """Serve vectors of texts beside answers, by the trunk of `model` as it is in its folder: they stay comparable
    while weights are published, and cost the memory of a second copy. None: not."""
    max_upload_bytes: Annotated[int, Field(gt=0)] = 64 * 1024**3
    """Largest weights payload that is accepted."""
    artifact_urls: list[str] = []
    """Prefixes of the URLs from which weights may be read; empty: none."""
