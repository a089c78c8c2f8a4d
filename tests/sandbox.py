"""Commands as a container runs them: an unknown uid, a read-only root, no home, only the mounted folders writable.

Linux namespaces and nothing else: a new root of the system's folders, Python and the code (in /opt/code), read-only,
with /tmp and the given folders mounted. The process is number 1 of its own, as in a container, so a signal that
it does not handle does nothing.
"""

from __future__ import annotations

import functools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = "/opt/code"
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64")
IMAGE_ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    "PYTHONPATH": CODE,
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}
"""What the Dockerfiles set."""


@dataclass(frozen=True)
class Mount:
    """A folder or file of this machine at a path of the container."""

    source: Path
    path: str
    read_only: bool = False


@functools.cache
def available() -> bool:
    """Whether this machine lets a test make namespaces."""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "x", "/mnt"],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def require() -> None:
    """Leaves the test out where there are no user namespaces; in CI it fails."""
    if not available():
        if os.environ.get("CI"):
            pytest.fail("user namespaces are not allowed here")
        pytest.skip("user namespaces are not allowed here")


def _script(root: Path, mounts: list[Mount], uid: int, workdir: str) -> str:
    lines = ["set -eu", f"root={shlex.quote(str(root))}", 'mount -t tmpfs -o mode=755 root "$root"']
    fixed = [Mount(Path("/") / name, f"/{name}", True) for name in SYSTEM if (Path("/") / name).exists()]
    places = {str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix)}
    fixed += [Mount(Path(place), place, True) for place in sorted(places | {sys.prefix, sys.base_prefix})]
    fixed += [Mount(ROOT, CODE, True), Mount(Path("/proc"), "/proc"), Mount(Path("/dev"), "/dev")]
    # /etc by links, so that files and folders can be mounted into it.
    lines += ['mkdir -p "$root/etc" "$root/.etc"; mount --rbind -o ro /etc "$root/.etc"']
    lines += ['for entry in /etc/*; do ln -s "/.$entry" "$root$entry"; done']
    lines += ['mkdir -p "$root/tmp"', 'mount -t tmpfs -o mode=1777 tmp "$root/tmp"']
    # The outer ones first: a volume at /tmp must not hide libraries that lie below the host's /tmp.
    for mount in sorted(fixed + mounts, key=lambda mount: mount.path.count("/")):
        source, target = shlex.quote(str(mount.source)), f'"$root"{shlex.quote(mount.path)}'
        if mount.source.is_symlink() and mount in fixed:
            lines.append(f"[ -e {target} ] || cp -a {source} {target}")
            continue
        make = f"mkdir -p {target}" if mount.source.is_dir() else f"mkdir -p $(dirname {target}); touch {target}"
        make = f"[ ! -L {target} ] || rm {target}; {make}"
        lines += [f"{make}; mount --rbind{' -o ro' if mount.read_only else ''} {source} {target}"]
    enter = f"--user --map-user={uid} --map-group={uid}"
    lines += ['mount -o remount,ro "$root"', f'exec unshare --root="$root" --wd={shlex.quote(workdir)} {enter} "$@"']
    return "\n".join(lines)


class Container:
    """A running command; its output goes to `log`."""

    def __init__(
        self,
        command: list[str],
        *,
        root: Path,
        log: IO[bytes],
        mounts: list[Mount] | None = None,
        environment: Mapping[str, str] | None = None,
        uid: int = 10001,
        workdir: str = "/tmp",
    ) -> None:
        """Args:
        root: an empty folder that becomes the mount point of the new root.
        """
        root.mkdir(parents=True, exist_ok=True)
        script = _script(root, mounts or [], uid, workdir)
        spaces = ["--user", "--map-root-user", "--mount", "--propagation", "private", "--pid", "--kill-child=KILL"]
        self._process: subprocess.Popen[Any] = subprocess.Popen(
            ["unshare", *spaces, "--fork", "sh", "-c", script, "sh", *command],
            env={**IMAGE_ENVIRONMENT, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
        )

    @property
    def pid(self) -> int | None:
        """Of the container's process number 1, as this machine counts; None once it has ended."""
        with suppress(OSError):
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            if children:
                return int(children[0])
        return None

    def signal(self, number: signal.Signals) -> None:
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def poll(self) -> int | None:
        """The exit code as a container runtime gives it: 128 + signal; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self, seconds: float) -> int:
        code = self._process.wait(seconds)
        return code if code >= 0 else 128 - code

    def kill(self) -> None:
        """Ends it at once, with all that it started."""
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()


def run(command: list[str], *, root: Path, seconds: float = 120, **options: Any) -> tuple[int, str]:
    """Runs a command to its end; its exit code and what it wrote."""
    log = root.with_suffix(".log")
    with log.open("w+b") as output:
        container = Container(command, root=root, log=output, **options)
        try:
            code = container.wait(seconds)
        finally:
            container.kill()
        return code, log.read_text(errors="replace")
