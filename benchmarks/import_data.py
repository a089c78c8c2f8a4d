"""Throughput and peak memory of importing HH-style rows on one core.

    python -m benchmarks.import_data --rows 1000000

Generates a gzip JSONL file of transcripts (2-6 turns, about 1 KB a side, one row in a hundred a duplicate, equal or
empty), imports it in a fresh process, prints rows a second (wall and CPU time) and peak resident memory, and writes
build/bench/import_data.json. Target: 20,000 rows a second on one core, below 500 MiB.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import orjson

from benchmarks.report import heading, write

TEXT = (
    "the order of what can you help with delivery late refund please account a to and is it my we will send again "
    "tomorrow invoice number thanks sorry about this problem café “quoted” naïve how do I bake bread without yeast"
)
WORDS = TEXT.split()


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Writes `rows` transcripts in the schema of Anthropic's HH-RLHF, as long on average as those of helpful-base.

    Both sides together: 1,500 characters, five human turns; nearly all hold characters beyond ASCII, as 83% there do.
    """
    draw = random.Random(seed)
    pool = [" ".join(draw.choices(WORDS, k=draw.randint(8, 45))) for _ in range(5000)]
    last = b""
    with gzip.open(path, "wb", compresslevel=1) as sink:
        for index in range(rows):
            if index % 100 == 99 and last:
                sink.write(last)
                continue
            shared = f"\n\nHuman: question {index} {draw.choice(pool)}"
            for _ in range(draw.randint(0, 2)):
                shared += f"\n\nAssistant: {draw.choice(pool)}\n\nHuman: {draw.choice(pool)}"
            answers = [f"{shared}\n\nAssistant: {draw.choice(pool)} {draw.choice(pool)}" for _ in range(2)]
            if index % 100 == 50:
                answers[1] = f"{shared}\n\nAssistant: "
            last = orjson.dumps({"chosen": answers[0], "rejected": answers[1]}) + b"\n"
            sink.write(last)


def run_import(source: Path, out: Path) -> dict[str, float]:
    """Imports in a child process pinned to one core and measures it."""
    command = "from steersman.cli import main; main()"
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.execv(
            sys.executable,
            [sys.executable, "-c", command, "data", "import", "hh", str(source), "--out", str(out), "--quiet"],
        )
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"import failed with status {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mib": after.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("build/bench/import_data.json"))
    parser.add_argument("--workdir", type=Path, help="where the files go; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
        source, out = Path(folder, "rows.jsonl.gz"), Path(folder, "out")
        write_rows(source, arguments.rows)
        figures = run_import(source, out)
        summary = json.loads((out / "import.json").read_bytes())
    figures |= {"rows": summary["read"], "written": summary["written"], "duplicates": summary["duplicates"]}
    figures |= {f"rows_per_{clock}_s": summary["read"] / figures[f"{clock}_s"] for clock in ("wall", "cpu")}
    write(heading(1, "orjson") | {name: round(value, 1) for name, value in figures.items()}, arguments.out)
    print(
        f"{summary['read']:,} rows read, {summary['written']:,} written, {summary['duplicates']:,} duplicates; "
        f"{summary['read'] / figures['wall_s']:,.0f} rows/s wall, {summary['read'] / figures['cpu_s']:,.0f} rows/s of "
        f"one core, peak {figures['peak_mib']:.0f} MiB"
    )


if __name__ == "__main__":
    main()
