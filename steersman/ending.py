"""The end of a process is not held up by a thread that waits for something which never answers."""

from __future__ import annotations

import logging
import os
import sys
import threading


def end_within(seconds: float, code: int) -> None:
    """Ends this process with `code` after `seconds`, where it has not ended by itself.

    For when the work is done and stored: the end of an event loop and of the interpreter join the threads of pools, and
    a thread in a call to a database or a server which does not answer would be joined without a limit.
    """

    def end() -> None:
        try:
            logging.getLogger("steersman").warning("a thread did not come to its end; the process ends without it")
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
