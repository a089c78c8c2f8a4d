"""Steersman: from human feedback to a chatbot that answers the way people prefer.

This package is the shared core. It imports no torch and neither `services` nor `training`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from steersman.home import settle

settle()  # before any library looks for the user's name or home

if TYPE_CHECKING:
    from steersman.notebook import Run as Run


def __getattr__(name: str) -> Any:
    """`steersman.Run`, which is read when it is asked for: most programs do not."""
    if name == "Run":
        from steersman.notebook import Run

        return Run
    raise AttributeError(f"module 'steersman' has no attribute {name!r}")
