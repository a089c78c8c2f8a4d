"""The embedded engine."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.policy.engine import Engine
from services.policy.engine_kinds.registry import EngineOptions, Served, engine


@engine("transformers")
class TransformersOptions(EngineOptions):
    holds_heads = True

    prefix_tokens: Annotated[int, Field(ge=0)] = 4_096
    """Tokens of ended conversations that are remembered beside the KV cache, so that their next turn computes only what
    is new; 0: none."""
    lookahead: bool = False
    """Drafts a single chat's answer on a CPU from the words in it. It pays where answers repeat their records at
    length; others take up to a tenth longer."""

    def build(self, served: Served) -> Engine:
        from services.policy.engines.transformers_engine import TransformersEngine

        options = served.compute | self.model_dump()
        return TransformersEngine(served.folder, name=served.name, on_death=served.on_death, **options)
