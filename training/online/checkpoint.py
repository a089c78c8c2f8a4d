"""Checkpoints of the trainer: complete or absent, proved by a digest, the newest two kept."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steersman.artifacts import atomic_dir, manifest_of_hashes, verify
from steersman.errors import FailedPreconditionError, SteersmanError

KEPT = 2
"""So that one that turns out to be damaged costs some steps, not the run."""
_NAME = re.compile(r"step-(\d+)")
_DIGESTS = "digests.json"
_DAMAGED = (SteersmanError, OSError, EOFError, ValueError, RuntimeError, LookupError, TypeError, pickle.PickleError)
"""What reading a damaged checkpoint raises."""


class Checkpoints:
    """Folders `step-N` below one folder; each appears under its name only when it is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the state after `step` steps and removes the oldest ones.

        Raises:
            StorageError: the disk is full or refuses; what was there stays.
        """
        with atomic_dir(self._folder / f"step-{step}") as folder:
            torch.save(state, folder / "state.pt")
            (folder / _DIGESTS).write_text(json.dumps(manifest_of_hashes(folder)))
        for _, path in self._all()[KEPT:]:
            shutil.rmtree(path, ignore_errors=True)

    def load(self, note: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """The newest good state and its step; None when there is none.

        Args:
            note: told of every damaged one that is passed over.

        Raises:
            FailedPreconditionError: there are some, and all are damaged.
        """
        reasons: list[str] = []
        damaged: list[Path] = []
        for step, path in self._all():
            try:
                verify(path, {"state.pt": json.loads((path / _DIGESTS).read_text())["state.pt"]})
                state = torch.load(path / "state.pt", weights_only=True)
                for other in damaged:
                    shutil.rmtree(other, ignore_errors=True)
                return step, state
            except _DAMAGED as error:
                damaged.append(path)
                reasons.append(f"{path} is damaged ({str(error).splitlines()[0] if str(error) else error!r})")
                note(f"{reasons[-1]}; looking for an older one")
        if reasons:
            raise FailedPreconditionError(
                f"no checkpoint can be read: {'; '.join(reasons)}; remove {self._folder} to start the stage over"
            )
        return None

    def _all(self) -> list[tuple[int, Path]]:
        """Newest first."""
        if not self._folder.is_dir():
            return []
        matches = [(_NAME.fullmatch(path.name), path) for path in self._folder.iterdir()]
        return sorted(((int(match.group(1)), path) for match, path in matches if match), reverse=True)
