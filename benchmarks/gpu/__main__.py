"""What a GPU makes of everything that computes, in at most nine minutes, without a network.

    python -m benchmarks.gpu [--device auto|cpu|cuda] [--quick] [--parts NAME ...] [--out build/bench/gpu_check.json]

Every part runs in a process of its own with a limit of its own, so that one that fails, hangs or runs out of memory
leaves the others alone; the report is written after each. First what is measured, one after the other, then what only
has to work, side by side. The exit status is 1 where a part failed. `--quick` takes tiny sizes: it shows that
everything runs, on a CPU too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import command_line, heading, table, write

LIMIT_SECONDS = 540.0
QUICK_SECONDS = 600.0
ROOT = Path(__file__).parents[2]


class Part(NamedTuple):
    module: str
    function: str
    seconds: float
    """Limit."""
    alone: bool
    """Its figures want the machine for themselves."""


PARTS = {
    "rollout": Part("rollout", "run", 120, True),
    "update-1b": Part("update", "run_1b", 90, True),
    "update-8b": Part("update", "run_8b", 90, True),
    "sync": Part("weight_sync", "run", 150, False),
    "tests": Part("suite", "run", 240, False),
    "learning": Part("learning", "run", 120, False),
    "quickstart": Part("quickstart", "run", 400, False),
}


def main() -> None:
    parser = command_line(__doc__, "gpu_check")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--bundle", type=Path, default=Path("build/gpu"), help="what benchmarks.gpu.bundle packed")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="limit of everything")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*arguments.child, arguments.device, arguments.quick, arguments.bundle)
        return
    raise SystemExit(0 if check(arguments) else 1)


def check(arguments: argparse.Namespace) -> bool:
    """Runs the parts, writes and prints the report; whether all went well."""
    device, machine = _device(arguments.device)
    report: dict[str, Any] = {**heading(os.cpu_count() or 1), "device": device, **machine, "quick": arguments.quick}
    report["parts"] = parts = {}
    until = time.monotonic() + arguments.seconds

    def run(name: str) -> None:
        # Tiny sizes have no figure to protect, and a machine that does other things besides is no fault.
        limit = QUICK_SECONDS if arguments.quick else min(PARTS[name].seconds, until - time.monotonic())
        print(f"== {name} (at most {limit:.0f} s)", flush=True)
        start = time.monotonic()
        found = _run(name, device, arguments, limit)
        with written:
            parts[name] = {**found, "wall_seconds": round(time.monotonic() - start, 1)}
            write(report, arguments.out)

    written = threading.Lock()
    for name in arguments.parts:
        if PARTS[name].alone:
            run(name)
    together = [name for name in arguments.parts if not PARTS[name].alone]
    with ThreadPoolExecutor(max_workers=len(PARTS)) as threads:
        list(threads.map(run, together))
    rows: list[list[object]] = []
    for name, found in parts.items():
        module = importlib.import_module(f"benchmarks.gpu.{PARTS[name].module}")
        seconds = f"{found['wall_seconds']:.0f} s"
        if "error" in found:
            rows.append([name, f"FAILED: {found['error'][-160:]}", "", "", seconds])
        else:
            rows += [[*row, seconds] for row in module.rows(found["found"])]
    print()
    table(("", "measured", "compared with", "ratio", "part took"), rows)
    return all("error" not in found for found in parts.values())


def _device(wanted: str) -> tuple[str, dict[str, Any]]:
    """The device, and what it is; SystemExit where CUDA is asked for and missing."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu-check: torch sees no CUDA device here; use --device cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return "cpu", {"gpu": None}
    from benchmarks.gpu.setup import Setup, ceilings

    memory = torch.cuda.get_device_properties(0).total_memory
    gpu = {"name": torch.cuda.get_device_name(), "memory_gib": memory / 2**30, "cuda": torch.version.cuda}
    found = {"gpu": gpu, "ceilings": ceilings(Setup("cuda", False, Path()))}
    torch.cuda.empty_cache()
    return "cuda", found


def _run(name: str, device: str, arguments: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One part in a process of its own: {"found": ...} or {"error": its last words}."""
    if limit < 5:
        return {"error": "no time was left"}
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--bundle", str(arguments.bundle)]
        command += ["--quick"] if arguments.quick else []
        log = arguments.out.with_name(f"gpu_{name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--child", name, result.name], stdout=output, stderr=output, start_new_session=True
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                return {"error": f"not done after {limit:.0f} s: {_last_words(log)}"}
            finally:
                _end(process)
        text = Path(result.name).read_text()
    if text:
        return dict(json.loads(text))
    return {"error": f"ended with {process.returncode}: {_last_words(log)}"}


def _last_words(log: Path) -> str:
    words = log.read_text(errors="replace").strip().splitlines()
    return f"{words[-1] if words else 'no message'} ({log})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The part and whatever it has started."""
    import contextlib
    import signal

    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _child(name: str, result: str, device: str, quick: bool, bundle: Path) -> None:
    from benchmarks.gpu.setup import Setup

    part = PARTS[name]
    try:
        module = importlib.import_module(f"benchmarks.gpu.{part.module}")
        found = {"found": getattr(module, part.function)(Setup(device, quick, bundle))}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:2000]}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
