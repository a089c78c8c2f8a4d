"""The models and readers of `steersman.documents`, from which every configuration is made."""

from steersman.documents import (
    FrozenModel,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    apply_overrides,
    commented_yaml,
    dump_yaml,
    load_model,
    read_yaml,
)

__all__ = [
    "FrozenModel",
    "NonNegative",
    "NonNegativeFloat",
    "Positive",
    "PositiveFloat",
    "Probability",
    "apply_overrides",
    "commented_yaml",
    "dump_yaml",
    "load_model",
    "read_yaml",
]
