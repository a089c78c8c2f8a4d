"""How a process may end, and what may be left."""

from __future__ import annotations

import contextlib
import os
import random
import time
from dataclasses import dataclass

import psutil

SLOW_DISK = "slow disk"
FIRST_SLOW = 10_000
"""Seeds below it draw what they drew before there was a slow disk."""


def slow_disk(seed: int) -> random.Random | None:
    """What its slow disk is drawn from, for about every eighth schedule."""
    draw = random.Random(f"{SLOW_DISK} {seed}")
    return draw if seed >= FIRST_SLOW and draw.random() < 0.12 else None


class Bad(Exception):
    """An invariant does not hold."""

    def __init__(self, message: str, faults: list[str] | None = None) -> None:
        super().__init__(message)
        self.faults = faults or []


@dataclass(frozen=True)
class Ended:
    """A program of ours that ended."""

    code: int
    errors: str
    """Standard error."""
    killed: bool
    """By us, so that it could say nothing."""

    @property
    def sentence(self) -> str:
        lines = [line for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def check(self) -> None:
        """Raises Bad unless the end is one clear sentence."""
        if self.killed and self.code < 0:
            return
        lines = [line for line in self.errors.splitlines() if line.strip()]
        if "Traceback" in self.errors:
            raise Bad(f"ended with {self.code} and a stack trace: ...{self.errors[-600:]}")
        if self.code < 0:
            raise Bad(f"ended by signal {-self.code}: {self.errors[-300:]}")
        if len(lines) != 1 or not lines[0].startswith("steersman: ") or len(lines[0]) < 18:
            raise Bad(f"ended with {self.code} and no single sentence: {self.errors[-600:]!r}")
        for word in ("it left no message", "EOFError", "Errno", "zip()"):
            if word in lines[0]:
                raise Bad(f"ended with {self.code} and a sentence that is not clear: {lines[0][-400:]}")


def orphans(known: frozenset[int] = frozenset(), seconds: float = 20.0) -> list[str]:
    """Processes that were left behind by those of a schedule; they are ended. Harnesses adopt orphans."""
    me = psutil.Process()
    deadline = time.monotonic() + seconds
    while True:
        left = []
        for child in me.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.pid in known:
                    continue
                if child.status() == psutil.STATUS_ZOMBIE:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(child.pid, os.WNOHANG)
                    continue
                left.append(child)
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    names = []
    for child in left:
        with contextlib.suppress(psutil.Error):
            names.append(f"{child.name()} {' '.join(child.cmdline()[-6:])[:200]}")
            child.kill()
    return names
