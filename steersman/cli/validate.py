"""`steersman validate`: everything that can be found wrong with a run before anything is spent."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from steersman.cli.options import JsonOption


def validate(
    file: Annotated[Path, typer.Option("--file", "-f", help="The manifest (kind: AlignmentRun).")],
    set_: Annotated[list[str], typer.Option("--set", metavar="spec.a.b=c", help="Override; repeatable.")] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Checks a manifest, its paths, every row of its data, and its model, and does nothing else.

    The model is computed with: a small random one of the same architecture must give the same numbers on every path
    that the run takes. One sentence says what is wrong first; the exit code is that of the run.
    """
    from steersman.cli.shapes import Valid, print_json
    from steersman.config.manifest import load_manifest
    from steersman.home import cache_folder
    from steersman.local import folder
    from steersman.local.executor import validate_run
    from steersman.local.expected import expected_of
    from steersman.local.pace import Pace
    from steersman.progress import clock

    manifest = load_manifest(file, set_)
    with tempfile.TemporaryDirectory(prefix="steersman-validate-") as scratch:
        resolved = folder.resolve(manifest, Path(scratch), file.absolute().parent)
        validate_run(resolved, Path(scratch), show=not as_json)
        needs = expected_of(resolved, Path(scratch))
    seconds = Pace(cache_folder() / "pace.json").expected_of_all(resolved, resolved.stage_names())
    if as_json:
        steps = {name: need.steps for name, need in needs.items()}
        memory = {name: need.memory_gib for name, need in needs.items()}
        print_json(Valid(str(file), manifest.metadata.name, manifest.stage_names(), steps, memory, seconds))
        return
    for name, need in needs.items():
        said = [f"{need.steps:,} {'step' if need.steps == 1 else 'steps'}"] if need.steps else []
        if need.memory_gib:
            said.append(f"at least {need.memory_gib:.2g} GiB for weights and optimizer")
        if said:
            print(f"{name}: {', '.join(said)}")
    expected = "" if seconds is None else f"; by earlier runs here about {clock(seconds)}"
    print(f"{file}: valid, {len(manifest.spec.stages)} stages: {', '.join(manifest.stage_names())}{expected}")
