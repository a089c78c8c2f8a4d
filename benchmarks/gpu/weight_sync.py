"""Weight sync of a random 0.6B model between a trainer and a policy service on one device.

Published by others for a model of this size on one GPU machine: 0.18 s (H100) and 0.59 s (A100).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import sync
from benchmarks.gpu.setup import Setup

PUBLISHED = {"H100": 0.18, "A100": 0.59}


def run(setup: Setup) -> dict[str, Any]:
    report: dict[str, Any] = {"published_seconds": PUBLISHED}
    with tempfile.TemporaryDirectory() as scratch:
        folder = setup.folder("0.6B", Path(scratch) / "model")
        ways = ("device", "folder") if setup.cuda else ("folder",)
        rounds, threads = (1, 2) if setup.quick else (4, 8)
        for kind in ("full", "lora"):
            for one in sync.measure(folder, kind, ways, 1, rounds, threads, setup.precision, setup.device):
                report[f"{kind} through {one['through']}"] = one
    return report


def rows(report: dict[str, Any]) -> Sequence[Sequence[object]]:
    return [
        (f"sync 0.6B, {name}", f"{one['seconds']:.3f} s, pause {one['pause_seconds']:.3f} s",
         f"published {PUBLISHED['H100']:.2f} s", f"{PUBLISHED['H100'] / one['seconds']:.2f}")
        for name, one in report.items()
        if isinstance(one, dict) and "seconds" in one
    ]  # fmt: skip
