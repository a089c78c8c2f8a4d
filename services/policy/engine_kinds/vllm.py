"""vLLM as the engine; it lives in the GPU image."""

from __future__ import annotations

from services.policy.engine import Engine
from services.policy.engine_kinds.registry import EngineOptions, Served, engine
from services.policy.engines.vllm_settings import VllmSettings
from steersman.errors import ConfigError


@engine("vllm")
class VllmOptions(VllmSettings, EngineOptions):
    def build(self, served: Served) -> Engine:
        try:
            from services.policy.engines.vllm_engine import VllmEngine
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"engine vllm is not in this installation ({error.name} is missing); use transformers"
            ) from None
        return VllmEngine(served.folder, self, name=served.name, on_death=served.on_death, **served.compute)
