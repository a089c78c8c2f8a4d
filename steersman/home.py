"""A name and a home for processes that have none: a container's uid need not be in passwd, its root may be read-only.

Libraries ask for both where one would not think of it (kopf for its identity, torch, numba, matplotlib and the hub for
their caches) and fail, or do their work anew in each process.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where models that are not folders yet, and what was measured on this machine, are kept."""
    return Path.home() / ".cache" / "steersman"


def settle() -> None:
    """Sets LOGNAME where the uid has no name, and HOME where there is none that can be written to."""
    uid = os.getuid()
    try:
        pwd.getpwuid(uid)
    except KeyError:
        os.environ.setdefault("LOGNAME", f"uid{uid}")
    if not _is_home(os.path.expanduser("~")):
        os.environ["HOME"] = str(_own_folder(uid))


def _is_home(path: str) -> bool:
    """Whether a folder is there, or can be made, and takes files."""
    if not os.path.isabs(path) or path == "/":
        return False
    try:
        os.makedirs(path, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK | os.X_OK)


def _own_folder(uid: int) -> Path:
    """One for all processes of this uid, so that they share their caches; what another user prepared is not taken."""
    folder = Path(tempfile.gettempdir()) / f"steersman-{uid}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid == uid and folder.is_dir() and not folder.is_symlink() and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"steersman-{uid}-"))
