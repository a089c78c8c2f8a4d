"""`steersman runs`: what lies in a folder of runs, and where each of them is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from steersman.cli.options import JsonOption
from steersman.cli.shapes import RunLine, print_json


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder of runs.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List the runs of this machine, the newest first: phase, stage, reward, rubric, age."""
    from steersman.errors import NotFoundError

    if not folder.is_dir():
        raise NotFoundError(f"{folder} is not a folder; name the one that --run-dir folders lie in")
    found = sorted((_look(path.parent) for path in folder.glob("*/manifest.yaml")), key=lambda line: line.age_seconds)
    if as_json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("run", "phase", "stages", "stage", "reward", "rubric", "age"):
        table.add_column(title, justify="right" if title in ("reward", "rubric", "age") else "left")
    for line in found:
        numbers = ["" if value is None else f"{value:.2f}" for value in (line.reward, line.rubric)]
        table.add_row(line.name, line.phase, f"{line.done}/{line.stages}", line.stage, *numbers, _age(line.age_seconds))
    Console().print(table if found else f"no runs in {folder}; steersman run makes one")


def _look(folder: Path) -> RunLine:
    from steersman.config.manifest import load_manifest
    from steersman.config.stages import read_complete
    from steersman.errors import SteersmanError
    from steersman.local.folder import is_held

    changed = max(path.stat().st_mtime for path in (folder, *folder.glob("*/metrics.jsonl"), *folder.glob("*.json")))
    age = max(0.0, time.time() - changed)
    try:
        names = load_manifest(folder / "manifest.yaml").stage_names()
        complete = [name for name in names if read_complete(folder, name)]
    except (SteersmanError, ValueError) as error:
        return RunLine(folder.name, str(folder), f"unreadable: {error}", "", 0, 0, None, None, age)
    left = [name for name in names if name not in complete]
    reward, rubric = _numbers(folder / "summary.json")
    if not left:
        phase = "Complete"
    elif is_held(folder):
        phase = "Running"
    else:
        phase = "Stopped" if complete or (folder / left[0]).exists() else "Begun"
    next_stage = left[0] if left else ""
    return RunLine(folder.name, str(folder), phase, next_stage, len(complete), len(names), reward, rubric, age)


def _numbers(summary: Path) -> tuple[float | None, float | None]:
    """Reward and rubric of the last model of a summary: the aligned one."""
    try:
        found: dict[str, Any] = json.loads(summary.read_text())
    except (OSError, ValueError):
        return None, None
    return _last(found.get("reward")), _last(found.get("rubric"))


def _last(models: Any) -> float | None:
    return list(models.values())[-1][0] if models else None


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
