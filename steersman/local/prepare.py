"""Brings base model and data to this machine, checks every row, and decides device and precision for the whole run.

A process of its own (`python -m steersman.local.prepare MANIFEST`), because it needs torch and the executor does not.
The answer is one JSON object in `prepared.json` beside the manifest: `for` (the name in the manifest), `base` (its
folder), `device`, `precision`, `data` (digests of the checked files).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from steersman import leaving
from steersman.artifacts import atomic_dir, file_digest, write_whole
from steersman.config.manifest import (
    AlignmentRun,
    IlqlStage,
    KtoStage,
    OnlineStage,
    RewardModelStage,
    load_manifest,
)
from steersman.config.stages import data_files
from steersman.errors import ConfigError, DataError, SteersmanError
from steersman.local.evaluations import check_evaluations
from steersman.local.lengths import check_prompts_leave_room
from steersman.progress import ConsoleReporter


def main() -> None:
    leaving.listen()
    manifest = Path(sys.argv[1])
    try:
        with ConsoleReporter("prepare") as reporter:
            prepare(load_manifest(manifest), manifest.parent, reporter)
    except SteersmanError as error:
        print(f"prepare: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def prepare(run: AlignmentRun, run_dir: Path, reporter: ConsoleReporter) -> None:
    """Writes `data/` for demo data, and `prepared.json`; a wrong row is found before any training starts."""
    if run.spec.data.demo is not None and not (run_dir / "data" / "manifest.json").is_file():
        reporter.note("generating the demo's data (synthetic)")
        _generate_demo(run, run_dir / "data")
    checked = _check_rows(run, run_dir, reporter)
    _check_own_code(run)
    check_evaluations(run, run_dir)
    reporter.activity("loading libraries")
    from steersman.home import cache_folder
    from steersman.local.architecture import check_architectures
    from steersman.nn.hardware import pick_device, pick_precision
    from steersman.nn.ilql import has_heads
    from steersman.nn.prepare import resolve_model

    model = run.spec.model
    cache_dir = cache_folder()
    base = resolve_model(model.base, cache_dir, model.revision, note=reporter.note)
    trains = next((stage.kind for _, stage in run.stages() if stage.trains_policy), None)
    if has_heads(base) and trains is not None:
        raise ConfigError(
            f"spec.model.base: {model.base} has the Q and V heads of ILQL, which stage {trains} would train without; "
            "start from the model before its stage ilql"
        )
    check_prompts_leave_room(run, run_dir, base, reporter)
    check_architectures(run, base, cache_dir, reporter)
    device = pick_device(model.device)
    precision = pick_precision(model.precision, device)
    decided = ", as measured on this machine" if (model.precision, device) == ("auto", "cpu") else ""
    reporter.note(f"{model.base} in {precision} on {device}{decided}")
    found = {"for": model.base, "base": str(base), "device": device, "precision": precision, "data": checked}
    write_whole(run_dir / "prepared.json", json.dumps(found))


def _check_own_code(run: AlignmentRun) -> None:
    """A function that is not there is found before anything is spent; ConfigError."""
    from steersman.rewards.custom import load_function

    for name, stage in run.stages():
        for reward in stage.reward.verifiable if isinstance(stage, OnlineStage) else ():
            if reward.python is not None:
                try:
                    load_function(reward.python)
                except ConfigError as error:
                    raise ConfigError(f"stage {name}: reward.verifiable: {error}") from None


def _check_rows(run: AlignmentRun, run_dir: Path, reporter: ConsoleReporter) -> dict[str, str]:
    from steersman.data.records import ROWS_OF, read_jsonl

    for kind, splits in data_files(run, run_dir).items():
        for path in splits.values():
            for number, _ in enumerate(read_jsonl(path, ROWS_OF[kind]), start=1):
                if number % 1000 == 0:
                    reporter.activity(f"checking {path.name}, row {number:,}")
    check_rows_fit_stages(run, run_dir)
    return found_digests(run, run_dir)


def check_rows_fit_stages(run: AlignmentRun, run_dir: Path) -> None:
    """Finds before the first stage what a later one would refuse when its turn comes.

    Raises:
        DataError: an aspect that nobody rated, a comparison without its margin, thumbs that all point one way, or two
            prompts with one id, or returns that are all the same.
    """
    from steersman.data.records import Aspects, Feedback, Preference, keyed_prompts, numbered_rows, read_jsonl

    files = data_files(run, run_dir)
    for path in files.get("prompts", {}).values():
        for _ in keyed_prompts(path):
            pass  # it refuses ids that repeat
    for name, stage in run.stages():
        if isinstance(stage, RewardModelStage) and stage.objective == "aspects":
            path = files["aspects"]["train"]
            rated = {aspect for row in read_jsonl(path, Aspects) for aspect in row.aspects}
            missing = sorted(set(stage.aspects) - rated)
            if missing:
                raise DataError(
                    f"{path.name}: no row rates the aspect {missing[0]!r} of stage {name}; "
                    f"the rows rate {', '.join(sorted(rated))}"
                )
        elif isinstance(stage, RewardModelStage) and stage.margin:
            for path in (
                files["preferences"][split] for split in ("train", "validation") if split in files["preferences"]
            ):
                for where, row in numbered_rows(path, Preference):
                    if row.margin is None:
                        line = where.rpartition(":")[2]
                        raise DataError(
                            f"{path.name}: row {line} has no margin; add it, or set margin: false in stage {name}"
                        )
        elif isinstance(stage, KtoStage):
            path = files["feedback"]["train"]
            labels = {row.label for row in read_jsonl(path, Feedback)}
            if len(labels) == 1:
                raise DataError(f"{path.name}: every label is {labels.pop()}; stage {name} learns from both thumbs")
        elif isinstance(stage, IlqlStage):
            _check_returns(stage, files)


def _check_returns(ilql: IlqlStage, files: Mapping[str, Mapping[str, Path]]) -> None:
    from steersman.data.aspects import Rule
    from steersman.data.records import read_jsonl
    from steersman.data.returns import SOURCES, check_they_differ, returns_of

    paths = [(kind, files[kind]["train"]) for kind in ilql.learn_from]
    rows = (row for kind, path in paths for row in read_jsonl(path, SOURCES[kind]))
    rewards = (reward for row in rows for one in returns_of(row, Rule(ilql.aspects)) for reward in one.rewards())
    check_they_differ(rewards, ", ".join(path.name for _, path in paths))


def found_digests(run: AlignmentRun, run_dir: Path) -> dict[str, str]:
    """SHA-256 of every data file by its path; ConfigError where one is missing."""
    digests = {}
    for kind, splits in data_files(run, run_dir).items():
        for split, path in splits.items():
            if not path.is_file():
                raise ConfigError(f"spec.data.{kind}.{split}: {path} does not exist; check the path in the manifest")
            digests[str(path)] = file_digest(path)
    return digests


def _generate_demo(run: AlignmentRun, folder: Path) -> None:
    from steersman.demo import Sizes, generate

    demo = run.spec.data.demo
    assert demo is not None
    sizes = Sizes(**demo.model_dump())
    with atomic_dir(folder) as partial:
        generate(partial, run.spec.seed, sizes)


if __name__ == "__main__":
    main()
