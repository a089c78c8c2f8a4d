"""Stages of another run that this one would make the same way (`spec.from`)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from steersman.artifacts import atomic_dir, verify
from steersman.config.manifest import AlignmentRun, load_manifest
from steersman.config.stages import read_complete, stage_digest
from steersman.errors import NotFoundError
from steersman.local.folder import differences, manifest_path


def source_folder(run: AlignmentRun, run_dir: Path) -> Path | None:
    """The other run's folder; a bare name is a folder beside this run's, as runs of a cluster lie.

    Raises:
        NotFoundError: `spec.from` names no run.
    """
    if run.spec.from_run is None:
        return None
    source = run_dir.parent / run.spec.from_run
    if not manifest_path(source).is_file():
        raise NotFoundError(f"spec.from: {source} is not a run's folder (it has no manifest.yaml); check the path")
    return source


def made_elsewhere(run: AlignmentRun, name: str, run_dir: Path) -> bool:
    """Whether `spec.from` has this stage complete and of the same content, and this run has not begun it."""
    source = source_folder(run, run_dir)
    complete = read_complete(source, name) if source is not None and not (run_dir / name).exists() else None
    return complete is not None and complete["digest"] == stage_digest(run, name, run_dir)


def take_over(run: AlignmentRun, name: str, run_dir: Path) -> str | None:
    """Brings a stage's folder over from `spec.from` if that run made the same; returns what there is to tell.

    The same: model, seed, data, the stage's configuration and those of all stages before it (`stage_digest`). Files
    are linked where the file system can, and their checksums compared first.

    Raises:
        NotFoundError, ChecksumError: a file of the other run is missing or has changed.
    """
    source = source_folder(run, run_dir)
    if source is None or (run_dir / name).exists():
        return None
    complete = read_complete(source, name)
    if complete is None:
        return f"{source} has no complete stage {name}; it is made here"
    if not made_elsewhere(run, name, run_dir):
        return f"{source / name} was made with other content ({_reason(run, name, source)}); it is made here"
    verify(source / name, complete["files"])
    with atomic_dir(run_dir / name) as partial:
        for file in [*complete["files"], "complete.json"]:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            _link(source / name / file, partial / file)
    return f"taken over from {source / name}"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _reason(run: AlignmentRun, name: str, source: Path) -> str:
    """The first things that differ up to this stage."""
    old, new = (one.spec.model_dump(mode="json", by_alias=True) for one in (load_manifest(manifest_path(source)), run))
    fields = ("seed", "model", "data")
    found = [said for field in fields for said in differences(old[field], new[field], f"spec.{field}")]
    index = run.stage_names().index(name)
    for number, (before, now) in enumerate(zip(old["stages"][: index + 1], new["stages"], strict=False)):
        found += differences(before, now, f"spec.stages.{number}")
    return "; ".join(found[:3]) or "its data files have changed"
