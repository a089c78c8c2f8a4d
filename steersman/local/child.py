"""`python -m steersman.local.child PARENT_PID MODULE ARGS...`: runs MODULE, and dies with its parent (0: any).

The kernel kills this process when the parent ends, however that happens (PR_SET_PDEATHSIG), so that not even a
`kill -9` of `steersman run` leaves a service behind. Nothing heavy may be imported here.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int = 0) -> None:
    """The kernel kills this process when its parent ends; `parent`: process id that it must have, 0: any."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        raise SystemExit(1)  # the parent died before it could be watched


def main() -> None:
    parent, module, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
