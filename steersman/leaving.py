"""SIGTERM asks a process of a stage to leave: it saves at the end of its step and goes, or goes at once.

A process that is PID 1 of a container ignores SIGTERM unless it handles it, and would be killed after the whole grace
period, its hardware held all the time. What cannot save in between leaves at once; a step that takes longer than
`LEAVE_SECONDS` is given up, because checkpoints are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

LEAVE_SECONDS = 20.0
"""From SIGTERM to the end at the latest; below the grace period of a pod."""
EXIT_CODE = 128 + signal.SIGTERM
"""What a container says that SIGTERM ended. A repetition goes on from the checkpoint."""

_asked = threading.Event()
_savers = 0
"""Loops that look at `asked` after every step."""


def listen(seconds: float = LEAVE_SECONDS) -> None:
    """From now on SIGTERM is obeyed; only in the main thread."""

    def leave(number: int, frame: FrameType | None) -> None:
        _asked.set()
        signal.signal(signal.SIGALRM, lambda *_: os._exit(EXIT_CODE))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        if not _savers:
            raise SystemExit(EXIT_CODE)

    _asked.clear()
    signal.signal(signal.SIGTERM, leave)


def asked() -> bool:
    """SIGTERM has come."""
    return _asked.is_set()


@contextlib.contextmanager
def saves_between_steps() -> Iterator[None]:
    """Inside, SIGTERM only makes `asked` true: the loop sees it after its step, saves and calls `leave`."""
    global _savers
    _savers += 1
    try:
        yield
    finally:
        _savers -= 1


def leave() -> None:
    """Ends the process after what it had to save."""
    raise SystemExit(EXIT_CODE)
