"""The folder of a run: what is in it already, and whether it belongs to this manifest."""

from __future__ import annotations

import fcntl
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.artifacts import storage_errors, verify, write_whole
from steersman.config.base import dump_yaml
from steersman.config.manifest import AlignmentRun, load_manifest
from steersman.config.stages import read_complete, stage_digest
from steersman.errors import ConfigError, ConflictError, SteersmanError
from steersman.rewards import split_reference

_DECIDES_ALL = ("seed", "model", "data")
"""Fields of the spec that decide the result of every stage."""


def manifest_path(run_dir: Path) -> Path:
    return run_dir / "manifest.yaml"


def resolve(run: AlignmentRun, run_dir: Path, manifest_dir: Path) -> AlignmentRun:
    """The manifest with paths made absolute and what an earlier start of the run has decided (`precision: auto`).

    Args:
        manifest_dir: folder that relative paths in the manifest start from.
    """
    spec = run.spec.model_dump(mode="json", by_alias=True)
    base = manifest_dir / spec["model"]["base"]
    if base.is_dir():
        spec["model"]["base"] = str(base.resolve())
    if spec["from"] is not None:
        spec["from"] = str((manifest_dir / spec["from"]).resolve())
    for splits in spec["data"].values():
        for split in ("train", "validation", "heldout"):
            if isinstance(splits, dict) and isinstance(splits.get(split), str):
                splits[split] = str((manifest_dir / splits[split]).resolve())
    for stage in spec["stages"]:
        online = stage.get("rl") or stage.get("rejectionSampling") or {}
        for reward in online.get("reward", {}).get("verifiable", ()):
            if reward["python"] is not None:
                reward["python"] = _own_code(reward["python"], manifest_dir)
        watch = (stage.get("rl") or {}).get("watch") or {}
        evaluate = stage.get("evaluate") or {}
        evaluate["suites"] = [str((manifest_dir / path).resolve()) for path in evaluate.get("suites", ())]
        for block in (watch, evaluate):
            scorers = block.get("scorers") or {}
            block["scorers"] = {name: str((manifest_dir / path).resolve()) for name, path in scorers.items()}
        if evaluate.get("knowledge") is not None:
            evaluate["knowledge"]["folder"] = str((manifest_dir / evaluate["knowledge"]["folder"]).resolve())
        for judge in evaluate.get("judges", ()):
            if judge["cache"] is not None:
                judge["cache"] = str((manifest_dir / judge["cache"]).resolve())
        if evaluate.get("champion") is not None:
            evaluate["champion"] = str((manifest_dir / evaluate["champion"]).resolve())
    before = _earlier(run_dir)
    if before is not None:
        for field in ("precision", "device"):
            if spec["model"][field] == "auto":
                spec["model"][field] = before.spec.model.model_dump()[field]
    return with_spec(run, spec)


def _own_code(reference: str, manifest_dir: Path) -> str:
    """`module:function` as a file where the module lies beside the manifest; what is installed stays a module."""
    place, function = split_reference(reference)
    file = manifest_dir / (place if place.endswith(".py") else place.replace(".", "/") + ".py")
    return f"{file.resolve()}:{function}" if place.endswith(".py") or file.is_file() else reference


def with_spec(run: AlignmentRun, spec: dict[str, Any]) -> AlignmentRun:
    """The same run with another spec (keys in camelCase)."""
    document = run.model_dump(mode="json", by_alias=True) | {"spec": spec}
    return AlignmentRun.model_validate(document, by_alias=True, by_name=False)


def write_manifest(run: AlignmentRun, run_dir: Path) -> None:
    """Writes `manifest.yaml`, whole or not at all."""
    with storage_errors(manifest_path(run_dir)):
        write_whole(manifest_path(run_dir), dump_yaml(run))


def is_held(run_dir: Path) -> bool:
    """Whether a `steersman run` works on the folder."""
    try:
        with (run_dir / ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@dataclass(frozen=True)
class Conflict:
    """The first stage in the folder that this manifest would not have made."""

    stage: str
    reason: str
    """What is to be said of the stage's folder."""

    def error(self, run_dir: Path) -> ConflictError:
        return ConflictError(
            f"{run_dir / self.stage} {self.reason}; give the run another metadata.name or --run-dir, "
            "or pass --force-restart to do that stage and the ones after it again"
        )


def settle(run: AlignmentRun, run_dir: Path, *, force_restart: bool) -> list[str]:
    """Checks that what the folder holds was made by this manifest; with `force_restart`, removes what was not.

    Call it again once the data is there: data files decide, too.

    Returns:
        Names of removed stages.

    Raises:
        ConflictError: a stage was made with other content, and `force_restart` is off.
    """
    conflict = find_conflict(run, run_dir)
    if conflict is None:
        return []
    if not force_restart:
        raise conflict.error(run_dir)
    names = run.stage_names()
    index = names.index(conflict.stage)
    removed = [name for name in names[index:] if (run_dir / name).exists()]
    for name in removed:
        shutil.rmtree(run_dir / name)
    if index == 0:
        shutil.rmtree(run_dir / "data", ignore_errors=True)
    return removed


def is_done(run: AlignmentRun, name: str, run_dir: Path) -> bool:
    """Whether a stage is complete and its files are as it left them.

    Raises:
        ConflictError: a file that it made is missing or has changed.
    """
    complete = read_complete(run_dir, name)
    if complete is None:
        return False
    try:
        verify(run_dir / name, complete["files"])
    except SteersmanError as error:
        raise ConflictError(f"{error}; remove {run_dir / name} and start again") from None
    return True


def find_conflict(run: AlignmentRun, run_dir: Path) -> Conflict | None:
    """The first stage that was begun with other content than the manifest's; None: there is none."""
    before = _earlier(run_dir)
    if before is None:
        # What is complete holds a digest of what made it; what was only begun does not.
        for name in run.stage_names():
            if read_complete(run_dir, name) is None and _is_begun(run_dir, name):
                return Conflict(name, "cannot go on (manifest.yaml, which says what it was begun with, is lost)")
        return None
    old, new = _plain(before), _plain(run)
    common = [found for field in _DECIDES_ALL for found in differences(old[field], new[field], f"spec.{field}")]
    for index, name in enumerate(run.stage_names()):
        complete = read_complete(run_dir, name)
        if complete is None and not _is_begun(run_dir, name):
            continue
        old_stage = old["stages"][index] if index < len(old["stages"]) else None
        changes = common + differences(old_stage, new["stages"][index], f"spec.stages.{index}")
        if complete is not None and not changes and complete["digest"] != stage_digest(run, name, run_dir):
            changes = ["its settings, data files or a stage before it have changed"]
        if changes:
            return Conflict(name, f"was made with other content ({'; '.join(changes[:3])})")
    return None


def _is_begun(run_dir: Path, name: str) -> bool:
    return (run_dir / name / "metrics.jsonl").is_file()


def differences(old: Any, new: Any, path: str) -> list[str]:
    """What differs between two plain values, a sentence for each field."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [found for key in keys for found in differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [f"{path} was {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(value) + "}"
    return "not set" if value is None else str(value)


def _plain(run: AlignmentRun) -> dict[str, Any]:
    return run.spec.model_dump(mode="json", by_alias=True)


def _earlier(run_dir: Path) -> AlignmentRun | None:
    """The manifest of the start before; None where there is none, or where what was written is damaged."""
    try:
        return load_manifest(manifest_path(run_dir))
    except ConfigError:
        return None
