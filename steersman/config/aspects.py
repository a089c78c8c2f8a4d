"""What the manifest and a reward model's own settings say of aspects."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from steersman.config.base import FrozenModel


class AspectThreshold(FrozenModel):
    """What an answer must reach before anything else about it counts."""

    aspect: str
    """One of the stage's aspects."""
    limit: Annotated[float, Field(allow_inf_nan=False)]
    """Least rating, in the unit of the ratings; of an aspect with a weight below 0 the largest."""
