"""Checkpoints of the trainer: complete or absent, the newest kept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from steersman.artifacts import atomic_dir

_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """Folders `step-N` below one folder; each appears under its name only when it is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the state after `step` steps and removes older ones."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_dir(self._folder / f"step-{step}") as folder:
            torch.save(state, folder / "state.pt")
        for number, path in self._all():
            if number < step:
                shutil.rmtree(path, ignore_errors=True)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """The newest state and its step; None when there is none."""
        found = self._all()
        if not found:
            return None
        step, path = max(found)
        return step, torch.load(path / "state.pt", weights_only=True)

    def _all(self) -> list[tuple[int, Path]]:
        if not self._folder.is_dir():
            return []
        matches = [(_NAME.fullmatch(path.name), path) for path in self._folder.iterdir()]
        return [(int(match.group(1)), path) for match, path in matches if match]
