"""A folder in memory that the processes of a run share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from steersman.openmp import remove_left_behind

ROOT = Path("/dev/shm")
_PREFIX = "steersman-"


@contextlib.contextmanager
def memory_folder(size: int, root: Path = ROOT) -> Iterator[Path | None]:
    """A folder for `size` bytes, removed at the end; None where memory has no file system with that much room.

    It is locked while its owner lives. What an owner that was killed has left is removed by the next one.
    """
    if not os.access(root, os.W_OK) or not shutil.disk_usage(root).free > size:
        yield None
        return
    with _locked(root, fcntl.LOCK_EX):  # nobody takes a new folder for one without an owner
        for left in root.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(left)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        owned = contextlib.ExitStack()
        owned.enter_context(_locked(folder, fcntl.LOCK_EX))
    with owned:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            remove_left_behind()


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
