"""A server of text-generation-inference as the engine."""

from __future__ import annotations

from services.policy.engine import Engine
from services.policy.engine_kinds.registry import EngineOptions, Served, engine
from steersman.errors import ConfigError


@engine("tgi")
class TgiOptions(EngineOptions):
    url: str | None = None
    """Address of the server."""

    def build(self, served: Served) -> Engine:
        from services.policy.engines.tgi import TgiEngine

        if self.url is None:
            raise ConfigError("tgi.url is missing; set the address of the TGI server")
        return TgiEngine(self.url, served.folder, name=served.name, on_death=served.on_death)
