"""Where a run keeps its stages, and when one is complete.

<run>/manifest.yaml              the resolved manifest
<run>/data/                      generated data
<run>/<stage>/config.yaml        the stage's resolved configuration
<run>/<stage>/metrics.jsonl      one JSON object a step
<run>/<stage>/model/             the model that the stage made, where it makes one
<run>/<stage>/complete.json      written last: digest of what went in, hashes of the data and of what came out
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steersman.artifacts import file_digest, manifest_of_hashes, read_json, storage_errors, verify, write_whole
from steersman.config.manifest import (
    DATA_KINDS,
    AlignmentRun,
    DataSplits,
    EvaluateStage,
    RewardModelStage,
    SftStage,
    StageOptions,
)
from steersman.data.records import read_lines
from steersman.errors import ChecksumError, ConfigError, DataError, FailedPreconditionError
from steersman.suites.schema import read_suite


def data_files(run: AlignmentRun, run_dir: Path) -> dict[str, dict[str, Path]]:
    """Existing JSONL files by kind of data and split; relative paths are taken from the run's folder."""
    files: dict[str, dict[str, Path]] = {}
    for kind in DATA_KINDS:
        splits: DataSplits | None = getattr(run.spec.data, kind)
        for split in ("train", "validation", "heldout"):
            if splits is not None:
                name = getattr(splits, split)
                path = run_dir / name if name else None
            else:
                path = run_dir / "data" / f"{kind}.{split}.jsonl"
                if run.spec.data.demo is None or not path.is_file():
                    path = None
            if path is not None:
                files.setdefault(kind, {})[split] = path
    return files


def check_data_files(run: AlignmentRun, run_dir: Path) -> None:
    """Finds without a model or a GPU what data a run lacks.

    Raises ConfigError for a file that is not there, or a suite that is wrong, DataError for one without a row.
    """
    for kind, splits in data_files(run, run_dir).items():
        for split, path in splits.items():
            if not path.is_file():
                raise ConfigError(f"spec.data.{kind}.{split}: {path} does not exist; check the path in the manifest")
            if next(read_lines(path), None) is None:
                raise DataError(f"spec.data.{kind}.{split}: {path} holds no row; name a file with rows or leave it out")
    for path in suite_files(run, run_dir):
        read_suite(path)


def suite_files(run: AlignmentRun, run_dir: Path, last: int | None = None) -> list[Path]:
    """Suites of the evaluations up to the stage number `last`; None: of all."""
    stages = run.stages()[: None if last is None else last + 1]
    return [run_dir / name for _, stage in stages if isinstance(stage, EvaluateStage) for name in stage.suites]


def stage_digest(run: AlignmentRun, name: str, run_dir: Path) -> str:
    """SHA-256 over everything that decides a stage's result: model, seed, data, this stage and all before it."""
    index = run.stage_names().index(name)
    spec = run.spec.model_dump(mode="json", by_alias=True)
    suites = suite_files(run, run_dir, index)
    content = {
        **({"suites": [file_digest(path) for path in suites if path.is_file()]} if suites else {}),
        "seed": spec["seed"],
        "model": spec["model"],
        "stages": spec["stages"][: index + 1],
        "data": data_digests(run, run_dir),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def data_digests(run: AlignmentRun, run_dir: Path) -> dict[str, str]:
    """SHA-256 of every data file of the run, by `kind.split`."""
    return {
        f"{kind}.{split}": file_digest(path)
        for kind, splits in data_files(run, run_dir).items()
        for split, path in splits.items()
        if path.is_file()
    }


def read_complete(run_dir: Path, name: str) -> dict[str, Any] | None:
    """Content of a stage's complete.json; None when the stage is not complete."""
    folder = run_dir / name
    content = read_json(folder / "complete.json", f"remove {folder} and start the run again, which makes it anew")
    if content is not None and not {"digest", "files"} <= content.keys():
        raise ChecksumError(
            f"{folder / 'complete.json'} is damaged (fields are missing); remove {folder} and start again"
        )
    return content


def mark_complete(run: AlignmentRun, name: str, run_dir: Path) -> None:
    """Writes complete.json as the last act of a stage."""
    folder = run_dir / name
    hashes = {key: value for key, value in manifest_of_hashes(folder).items() if not key.startswith("checkpoints/")}
    content = {
        "stage": name,
        "digest": stage_digest(run, name, run_dir),
        "data": data_digests(run, run_dir),
        "files": hashes,
    }
    with storage_errors(folder):
        write_whole(folder / "complete.json", json.dumps(content, indent=2))


def verified(run_dir: Path, folder: Path) -> Path:
    """The folder of a model that an earlier stage made, after comparing its files with what the stage noted of them.

    Raises:
        FailedPreconditionError: the stage is not complete: what lies there may be the half of a model.
        ChecksumError, NotFoundError: a file has changed or is missing.
    """
    name = folder.relative_to(run_dir).parts[0]
    complete = read_complete(run_dir, name)
    if complete is None:
        raise FailedPreconditionError(f"{folder}: stage {name} is not complete; run it to its end first")
    inside = folder.relative_to(run_dir / name).as_posix() + "/"
    verify(run_dir / name, {file: digest for file, digest in complete["files"].items() if file.startswith(inside)})
    return folder


def weights_folder(run: AlignmentRun, run_dir: Path) -> Path | None:
    """Where weights go through to the policy service; None: over gRPC."""
    name = run.spec.services.policy.weights_folder
    return run_dir / name if name else None


def policy_folder(run: AlignmentRun, name: str, run_dir: Path) -> Path | None:
    """Model folder of the newest stage before `name` that trains the policy; None: the base model."""
    return _newest(run, name, run_dir, lambda stage: stage.trains_policy)


def sft_folder(run: AlignmentRun, name: str, run_dir: Path) -> Path | None:
    """Model folder of the newest SFT stage before `name`; None: the base model."""
    return _newest(run, name, run_dir, lambda stage: isinstance(stage, SftStage))


def reward_model_folders(run: AlignmentRun, name: str, run_dir: Path) -> dict[str, Path]:
    """Model folders of the reward-model stages before `name`, by the scorer's name."""
    return {
        stage.name: run_dir / folder / "model"
        for folder, stage in stages_before(run, name)
        if isinstance(stage, RewardModelStage)
    }


def stages_before(run: AlignmentRun, name: str) -> list[tuple[str, StageOptions]]:
    return run.stages()[: run.stage_names().index(name)]


def _newest(run: AlignmentRun, name: str, run_dir: Path, wanted: Callable[[StageOptions], bool]) -> Path | None:
    found = [folder for folder, stage in stages_before(run, name) if wanted(stage)]
    return run_dir / found[-1] / "model" if found else None
