"""Online methods, one file each. `build(stage)` gives the one that the manifest names; see `method.Method`.

A method is added by its options in `steersman.config.algorithms.ONLINE_METHODS` and a file here whose class carries
`@register(Options)`; manifest, JSON schema and CRD follow. `tests/unit/algorithms/test_methods.py` walks the registry
and says what else is missing.
"""

from __future__ import annotations

import importlib
import pkgutil

from steersman.config.manifest import RlStage
from training.algorithms.method import METHODS, Method

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["METHODS", "Method", "build"]


def build(stage: RlStage) -> Method:
    """The method that the stage asks for."""
    return METHODS[stage.algorithm](stage)
