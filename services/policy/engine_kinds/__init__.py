"""Engines of the policy service, one file each (`registry`)."""

import importlib

from services.policy.engine_kinds.registry import ENGINES, EngineOptions, Served

for _module in ("transformers", "vllm", "tgi"):
    importlib.import_module(f"services.policy.engine_kinds.{_module}")

__all__ = ["ENGINES", "EngineOptions", "Served"]
