"""Runs one stage of a run: `python -m training.stage --run-dir DIR --stage NAME [--set spec.a.b=c]`.

The same entry point on this machine and in a Kubernetes Job. A stage that is complete is not run
again; one that was killed continues. The last line on standard error is the reason of a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from steersman import leaving, loading
from steersman.artifacts import refusal, storage_errors
from steersman.config.base import dump_yaml
from steersman.config.manifest import AlignmentRun, load_manifest
from steersman.config.stages import (
    data_files,
    mark_complete,
    policy_folder,
    read_complete,
    reward_model_folders,
    sft_folder,
    stage_digest,
    verified,
)
from steersman.errors import ConfigError, SteersmanError, meant
from steersman.heap import keep_freed_memory
from steersman.local.takeover import made_elsewhere, take_over
from steersman.local.tracked import followed
from steersman.openmp import prefer_yielding_threads
from steersman.progress import ConsoleReporter


class SilentReporter:
    """Of the ranks that leave the talking to the first."""

    def __enter__(self) -> SilentReporter:
        return self

    def __exit__(self, *exception: object) -> None: ...
    def step(self, step: int, total: int, **metrics: float) -> None: ...
    def note(self, text: str) -> None: ...
    def activity(self, text: str) -> None: ...
    def rows_in(self, metrics_path: Path) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.stage", description="Runs one stage of a run")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the run, with manifest.yaml")
    parser.add_argument("--stage", required=True, help="name of the stage, for example rl")
    parser.add_argument("--set", action="append", default=[], metavar="spec.a.b=c", help="override; repeatable")
    arguments = parser.parse_args()
    loading.begin()
    prefer_yielding_threads()
    keep_freed_memory()
    leaving.listen()
    try:
        run_stage(arguments.run_dir.absolute(), arguments.stage, arguments.set, loaded=loading.done)
    except (SteersmanError, OSError) as error:
        told = error if isinstance(error, SteersmanError) else refusal(error)
        if told is None:
            raise
        with contextlib.suppress(OSError):  # a full disk takes no last words
            print(f"{arguments.stage}: {told}", file=sys.stderr, flush=True)
        raise SystemExit(told.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run_stage(run_dir: Path, name: str, overrides: list[str], loaded: Callable[[], object] | None = None) -> None:
    """Runs the stage unless it is complete; raises SteersmanError.

    Args:
        loaded: called when the libraries are, in a process of its own: a trainer asks for full collections.
    """
    run = load_manifest(run_dir / "manifest.yaml", overrides)
    names = run.stage_names()
    if name not in names:
        raise ConfigError(f"--stage {name}: the run has no such stage; it has {', '.join(names)}{meant(name, names)}")
    stage = dict(run.stages())[name]
    complete = read_complete(run_dir, name)
    if complete is not None:
        if complete["digest"] == stage_digest(run, name, run_dir):
            return
        raise ConfigError(
            f"{run_dir / name} was made with another configuration or other data; "
            "give the run another name or remove that folder"
        )
    folder = run_dir / name
    is_first = os.environ.get("RANK", "0") == "0"  # of the ranks under torchrun
    if made_elsewhere(run, name, run_dir):
        if is_first:
            print(f"{name}: {take_over(run, name, run_dir)}", flush=True)
        return
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if is_first:
            (folder / "config.yaml").write_text(dump_yaml(stage))
    with followed(run, run_dir, os.environ, part=True) if is_first else contextlib.nullcontext():
        _run(run, name, run_dir, is_first, loaded or (lambda: None))


def _run(run: AlignmentRun, name: str, run_dir: Path, is_first: bool, loaded: Callable[[], object]) -> None:
    stage, folder = dict(run.stages())[name], run_dir / name
    module, _, function = stage.runner.partition(":")
    with ConsoleReporter(name, folder / "metrics.jsonl") if is_first else SilentReporter() as reporter:
        context = build_context(run, name, run_dir, reporter)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from training.parallel import meet

            meet(context.device)
        reporter.note(f"{name}: {context.precision} on {context.device}")
        run_it = getattr(importlib.import_module(module), function)
        loaded()
        run_it(stage, context)
    if is_first:
        mark_complete(run, name, run_dir)
        shutil.rmtree(context.checkpoints, ignore_errors=True)


def build_context(run: AlignmentRun, name: str, run_dir: Path, reporter):
    """What the stage is given; checks its data files before anything is loaded."""
    from steersman.home import cache_folder
    from steersman.nn.hardware import pick_device, pick_precision, set_threads
    from steersman.nn.prepare import resolve_model
    from training.context import DataFiles, StageContext

    spec = run.spec
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    set_threads(spec.model.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here))
    device = pick_device(spec.model.device)
    data = {kind: DataFiles(**splits) for kind, splits in data_files(run, run_dir).items()}
    for kind, files in data.items():
        for path in (files.train, files.validation, files.heldout):
            if path is not None and not path.is_file():
                raise ConfigError(f"data.{kind}: {path} does not exist; check the path in the manifest")
    cache_dir = cache_folder()
    base = resolve_model(spec.model.base, cache_dir, spec.model.revision, note=reporter.note)
    policy, sft = policy_folder(run, name, run_dir), sft_folder(run, name, run_dir)
    if os.environ.get("RANK", "0") == "0":
        reporter.activity("comparing the models of earlier stages with their checksums")
        for folder in {policy, sft, *reward_model_folders(run, name, run_dir).values()}:
            if folder is not None:
                verified(run_dir, folder)
    return StageContext(
        run=run,
        run_dir=run_dir,
        stage_dir=run_dir / name,
        name=name,
        spec=spec,
        base_model=base,
        policy_model=policy or base,
        sft_model=sft,
        seed=spec.seed,
        reporter=reporter,
        device=device,
        precision=pick_precision(spec.model.precision, device),
        cache_dir=cache_dir,
        data=data,
    )


if __name__ == "__main__":
    main()
