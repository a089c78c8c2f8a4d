"""Configuration: frozen pydantic models, YAML as a sparse overlay, `--set a.b=c` on top."""

from steersman.config.base import FrozenModel, apply_overrides, dump_yaml, load_model, read_yaml
from steersman.config.manifest import AlignmentRun, Stage, load_manifest

__all__ = [
    "AlignmentRun",
    "FrozenModel",
    "Stage",
    "apply_overrides",
    "dump_yaml",
    "load_manifest",
    "load_model",
    "read_yaml",
]
