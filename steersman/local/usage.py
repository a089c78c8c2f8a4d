"""What a run takes: memory over all its processes, and seconds by phase, kept across restarts."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from steersman.artifacts import storage_errors, write_whole


class Usage:
    """Measures while it is open; `usage.json` in the run's folder adds up over restarts."""

    def __init__(self, path: Path, interval: float = 1.0) -> None:
        """Args:
        path: the file.
        interval: seconds between two looks at the memory.
        """
        self._path = path
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory")
        self.seconds: dict[str, float] = {}
        self.peak_memory_gib = 0.0
        with contextlib.suppress(ValueError, LookupError, TypeError):  # cut short: it begins anew
            known = json.loads(path.read_bytes()) if path.is_file() else {}
            self.seconds, self.peak_memory_gib = dict(known["seconds"]), float(known["peak_memory_gib"])

    def __enter__(self) -> Usage:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._save()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's duration to a phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 2)
            self._save()

    def forget(self, phase: str) -> None:
        """Drops a phase that begins again from nothing."""
        self.seconds.pop(phase, None)

    def _watch(self) -> None:
        last = 0
        while not self._done.wait(self._interval):
            resident = tree_memory(shared_once=False)
            # Counting shared pages once means a walk over all pages, so it is done only where it can change the peak.
            if resident > self.peak_memory_gib * 2**30 and abs(resident - last) > resident / 100:
                last = resident
                self.peak_memory_gib = round(max(self.peak_memory_gib, tree_memory() / 2**30), 3)

    def _save(self) -> None:
        found = {"seconds": self.seconds, "peak_memory_gib": self.peak_memory_gib}
        with storage_errors(self._path):
            write_whole(self._path, json.dumps(found, indent=2))


def tree_memory(*, shared_once: bool = True) -> int:
    """Bytes in memory of this process and its descendants.

    Args:
        shared_once: pages that they share count once (PSS), instead of in every process (RSS), which is cheap.
    """
    me = psutil.Process()
    return sum(_memory(process, shared_once) for process in [me, *me.children(recursive=True)])


def _memory(process: psutil.Process, shared_once: bool) -> int:
    try:
        if shared_once:
            with contextlib.suppress(psutil.AccessDenied):
                return int(process.memory_full_info().pss)
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
