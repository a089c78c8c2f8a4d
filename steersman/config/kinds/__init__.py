"""Kinds of stages, one file each: options, and what the rest must know of them (`registry`)."""

import importlib

from steersman.config.kinds.registry import STAGES, Place, StageOptions

for _module in (
    "sft", "reward_model", "rl", "rejection_sampling", "dpo", "kto", "ilql", "evaluate", "release",
):  # fmt: skip
    importlib.import_module(f"steersman.config.kinds.{_module}")

__all__ = ["STAGES", "Place", "StageOptions"]
