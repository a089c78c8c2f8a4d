"""A benchmark's command line, and its report: where and with what it was measured, its file, its table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil

from steersman.artifacts import write_whole


def command_line(
    description: str | None, report: str = "", *, rounds: int = 0, model: bool = False
) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks share.

    Args:
        description: the module's docstring, for --help.
        report: name of the file below build/bench; none: no --out.
        rounds: default of --rounds, beside which there is --threads; 0: neither.
        model: whether there is a --model, see `base_model`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        from steersman.nn.prepare import EMBEDDED_MODEL

        parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder, hub id, or the embedded model")
        parser.add_argument(
            "--cache-dir", type=Path, default=Path("build/models"), help="where the embedded model goes"
        )
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds)
        parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    if report:
        parser.add_argument("--out", type=Path, default=Path(f"build/bench/{report}.json"))
    return parser


def base_model(arguments: argparse.Namespace) -> Path:
    """Folder of the model that --model names."""
    from steersman.nn.prepare import resolve_model

    return resolve_model(arguments.model, arguments.cache_dir, note=print)


def heading(threads: int, *packages: str) -> dict[str, object]:
    """Date, machine and versions of a report, of packages that are installed; by default the libraries that compute."""
    names = packages or ("torch", "transformers", "trl", "peft", "grpcio")
    with open("/proc/cpuinfo") as info:
        cpu = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu or platform.machine(), "cores": psutil.cpu_count(), "threads": threads},
        "versions": {name: version for name in names if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(report: Mapping[str, object], path: Path) -> None:
    write_whole(path, json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints left-aligned names and right-aligned numbers."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(f"{value:{'<' if not i else '>'}{widths[i]}}" for i, value in enumerate(row)))


def _cell(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )
