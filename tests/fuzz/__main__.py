"""`make fuzz`: a million hostile inputs to everything that reads; the last line is one JSON object.

    python -m fuzz --inputs 1000000 --seed 1 [--only NAME]

An input is bad when the target raises what it does not document, takes more than two seconds of processor time, or more
memory than the limit. Each bad one is written with what repeats it; those that hypothesis drew are shrunk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure

from fuzz.targets import Target, targets

SECONDS = 2.0
MEMORY = 4 * 2**30
_ROUND = 2000
"""Examples of one hypothesis test: more make it slow, because it remembers them."""


class Slow(Exception):
    """An input took longer than it may."""


def fuzz(name: str, inputs: int, start: int) -> dict[str, Any]:
    """Runs one target; a process of its own, so that its memory can be bounded."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    target = next(target for target in targets() if target.name == name)
    round_of(target, 1, start)  # what is imported late is loaded outside the clock
    count, bad, number = 0, [], start
    while count < inputs and len(bad) < 5:
        wanted = min(_ROUND, inputs - count)
        tried, problem = round_of(target, wanted, number)
        count += tried
        if problem is not None:
            bad.append({"target": name, "seed": number, "inputs": wanted, **problem})
        number += 1
    return {"target": name, "inputs": count, "bad": bad, "peak_mib": _peak()}


def round_of(target: Target, inputs: int, number: int) -> tuple[int, dict[str, str] | None]:
    """Throws `inputs` values that follow from `number`; returns how many, up to the first bad one, and that."""
    source = target.source()
    if isinstance(source, st.SearchStrategy):
        return _drawn(target, source, inputs, number)
    draw = random.Random(number)
    for tried in range(inputs):
        value = source(draw)
        try:
            try:
                _read(target, value)
            except Slow:  # once: the machine was busy, or a library was loaded
                _read(target, value)
        except Exception as error:
            return tried + 1, _problem(error, value)
    return inputs, None


def _read(target: Target, value: Any) -> None:
    began = time.thread_time()
    with contextlib.suppress(*target.allowed):
        target.read(value)
    if time.thread_time() - began > SECONDS:
        raise Slow(f"{time.thread_time() - began:.1f} s")


def _problem(error: BaseException, value: Any) -> dict[str, str]:
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.relpath(where.filename)}:{where.lineno}"
    return {"error": f"{type(error).__name__}: {error}"[:300], "at": place, "value": repr(value)[:300]}


def _drawn(
    target: Target, strategy: st.SearchStrategy[Any], inputs: int, number: int
) -> tuple[int, dict[str, str] | None]:
    """The same by hypothesis."""
    tried = 0
    last: Any = None

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )
    @given(strategy)
    def once(value: Any) -> None:
        nonlocal tried, last
        tried += 1
        last = value
        _read(target, value)

    try:
        once()
    except FlakyFailure as error:
        if all(isinstance(each, Slow) for each in error.exceptions):
            return tried, None  # slow once
        return tried, {"error": str(error)[:300], "at": "", "value": repr(last)[:300]}
    except Exception as error:
        return tried, _problem(error, last)
    return tried, None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _apart(job: tuple[str, int, int]) -> dict[str, Any]:
    """Runs a part in a process of its own: what it breaks, and the memory it may take, are its own."""
    name, inputs, number = job
    command = [sys.executable, "-m", "fuzz", "--part", name, "--inputs", str(inputs), "--seed", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    words = (done.stderr.strip().splitlines() or ["no words"])[-1][:300]
    problem = {"target": name, "seed": number, "error": f"the process ended with {done.returncode}: {words}"}
    return {"target": name, "inputs": 0, "bad": [problem]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Hostile input to everything that reads.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1, help="what it begins with; the same seed gives the same inputs")
    parser.add_argument("--only", help="one target")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(fuzz(options.part, options.inputs, options.seed)))
        return 0
    chosen = [target for target in targets() if options.only in (None, target.name)]
    if not chosen:
        parser.error(f"--only {options.only}: there are {', '.join(target.name for target in targets())}")
    shares = sum(target.share for target in chosen)
    jobs = []
    for number, target in enumerate(chosen):
        inputs = -(-options.inputs * target.share // shares)
        jobs.append((target.name, inputs, options.seed + 100_000 * number))
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.processes) as threads:
        for result in threads.map(_apart, jobs):
            found.append(result)
            print(f"fuzz  {result['target']:<18} {result['inputs']:>9,} inputs  {len(result['bad'])} bad", flush=True)
    bad = [item for result in found for item in result["bad"]]
    for item in bad:
        print(f"fuzz  {json.dumps(item)}")
    print(json.dumps({"inputs": sum(result["inputs"] for result in found), "bad": bad}), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
