"""No garbage collection while libraries are loaded, and none that walks them afterwards.

A process of torch and its friends makes a million objects that stay. Collections on the way are a quarter of the time
to load them, and later every full one would walk them all, for a second that others wait.
"""

from __future__ import annotations

import gc


def begin() -> None:
    """At the start of a process, before anything large is imported."""
    gc.disable()


def done() -> None:
    """What is there now stays; collections look at what comes after."""
    gc.collect()
    gc.freeze()
    gc.enable()
