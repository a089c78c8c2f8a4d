"""`make chaos`: seeded random schedules of faults; the last line is one JSON object.

    python -m chaos [--family run|gateway] [--first SEED] [--schedules N | --seeds A,B,...] [--minutes 10]
                    [--shape NAME] [--log FILE]

`CHAOS_SEED=n` repeats one schedule. `schedules` is the sum of `equal` (it went on, or was started again after a kill,
to the same weights, rows and records), `stopped_clearly` (it stopped with one sentence, and after the mend, started
again, came to the same) and `bad`. What ran by fault is written to build/bench/chaos.json. `--log` keeps a line of each
schedule; seeds that the file has already, of the family, are not run again, so that many hours can be had in parts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from chaos import forking
from chaos.outcome import FIRST_SLOW, Bad, orphans

FAMILIES = ("run", "gateway")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description="Seeded random faults, both families.")
    parser.add_argument("--family", choices=FAMILIES, help="one of them; both without it, one after the other")
    parser.add_argument("--first", type=int, help="first seed; drawn without it")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], help="these: 7,9,12")
    parser.add_argument("--schedules", type=int, help="of each family; without it until the time is over")
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("CHAOS_MINUTES") or 10))
    parser.add_argument("--shape", help="only schedules of this shape")
    parser.add_argument("--log", type=Path, help="JSON lines, one for each schedule; those that it has are passed over")
    parser.add_argument("--out", type=Path, default=forking.ROOT / "build" / "bench" / "chaos.json")
    options = parser.parse_args()
    families = [options.family] if options.family else list(FAMILIES)
    if os.environ.get("CHAOS_SEED"):
        options.first, options.schedules = int(os.environ["CHAOS_SEED"]), 1
    first = options.first if options.first is not None else random.SystemRandom().randrange(10**6)
    if len(families) > 1:
        return _both(options, first)
    last = max(options.seeds) if options.seeds else first + (options.schedules or FIRST_SLOW)
    disk = forking.find_disk() if last >= FIRST_SLOW else None
    try:
        result = _family(families[0], first, options, disk)
    finally:
        if disk is not None:
            disk.close()
    for bad in result["bad"]:
        print(f"chaos  {json.dumps(bad)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: result[name] for name in ("schedules", "equal", "stopped_clearly", "bad")}), flush=True)
    return 1 if result["bad"] else 0


def _both(options: argparse.Namespace, first: int) -> int:
    """Each family in a process of its own, with half of the time: one loads torch, the other must have no threads."""
    total: Counter[str] = Counter()
    bad: list[Any] = []
    found = {}
    for family in FAMILIES:
        out = options.out.with_name(f"chaos_{family}.json")
        command = [sys.executable, "-m", "chaos", "--family", family, "--first", str(first), "--out", str(out)]
        command += ["--minutes", str(options.minutes / len(FAMILIES))]
        command += ["--schedules", str(options.schedules)] if options.schedules else []
        command += ["--seeds", ",".join(map(str, options.seeds))] if options.seeds else []
        command += ["--log", str(options.log)] if options.log else []
        out.unlink(missing_ok=True)
        done = subprocess.run(command, check=False)
        result = json.loads(out.read_text()) if out.is_file() else None
        if result is None:
            bad.append({"family": family, "seed": first, "error": f"the harness ended with {done.returncode}"})
            continue
        found[family] = result["faults"]
        total.update({name: result[name] for name in ("schedules", "equal", "stopped_clearly")})
        bad += result["bad"]
    numbers = {name: total[name] for name in ("schedules", "equal", "stopped_clearly")} | {"bad": bad}
    options.out.write_text(json.dumps({**numbers, "faults": found}, indent=2) + "\n")
    print(json.dumps(numbers), flush=True)
    return 1 if bad else 0


def _family(name: str, first: int, options: argparse.Namespace, disk: forking.Disk | None) -> dict[str, Any]:
    forking.preload(name)
    forking.adopt_orphans()
    scratch = Path(tempfile.mkdtemp(prefix="steersman-chaos-"))
    family = make_family(name, scratch, disk)
    counts: Counter[str] = Counter()
    faults: dict[str, Counter[str]] = {}
    bad: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * options.minutes
    done = _seeds(options.log, name)
    seeds = options.seeds or (range(first, first + options.schedules) if options.schedules else itertools.count(first))
    try:
        for seed in seeds:
            if time.monotonic() > deadline and (not (options.schedules or options.seeds) or options.log):
                break
            if seed in done:
                continue
            began, computed = time.monotonic(), _computed()
            line: dict[str, Any] = {"family": name, "seed": seed}
            try:
                outcome, names = family.schedule(seed, options.shape)
            except Bad as error:
                outcome, names = "bad", error.faults
                line["error"] = str(error)[:1500]
                again = f"CHAOS_SEED={seed} make chaos ARGS='--family {name}'"
                bad.append({**line, "faults": names, "repeat": again})
            counts[outcome] += 1
            for fault in set(names):
                faults.setdefault(fault, Counter())[outcome] += 1
            seconds, computed = time.monotonic() - began, _computed() - computed
            text = f"chaos  {name} {seed}  {outcome}  {seconds:.0f} s, {computed:.1f} s computed  {', '.join(names)}"
            print(text + (f"  {line['error']}" if outcome == "bad" else ""), flush=True)
            if options.log:
                line |= {"outcome": outcome, "faults": names, "seconds": round(seconds, 1), "cpu": round(computed, 1)}
                with options.log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    finally:
        if hasattr(family, "close"):
            family.close()
        orphans(seconds=0)
        if not os.environ.get("CHAOS_KEEP"):
            shutil.rmtree(scratch, ignore_errors=True)
    return {
        "schedules": sum(counts.values()),
        "equal": counts["equal"],
        "stopped_clearly": counts["stopped_clearly"],
        "bad": bad,
        "faults": {fault: dict(count) for fault, count in sorted(faults.items())},
    }


def _seeds(log: Path | None, family: str) -> set[int]:
    """Those that a log has."""
    lines = log.read_text().splitlines() if log is not None and log.is_file() else []
    return {line["seed"] for line in map(json.loads, lines) if line["family"] == family}


def _computed() -> float:
    """Seconds of processors that all children took that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def make_family(name: str, scratch: Path, disk: forking.Disk | None) -> Any:
    if name == "run":
        from chaos.runs import Family

        return Family(scratch, disk=disk)
    from chaos.gateways import GatewayFamily

    return GatewayFamily(scratch, disk=disk)


if __name__ == "__main__":
    sys.exit(main())
