"""Throughput and peak memory of importing HH-style rows, and of releasing them, each on one core.

    python -m benchmarks.import_data --rows 1000000

Generates a gzip JSONL file of transcripts (2-6 turns, about 1 KB a side, one row in a hundred a duplicate, equal or
empty), imports it in a fresh process, makes a release of what was imported in another, prints rows a second (wall and
CPU time) and peak resident memory, and writes build/bench/import_data.json. Target: 20,000 rows a second on one core
each, below 500 MiB for a million rows and below 1 GiB for ten million.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import orjson

from benchmarks.report import command_line, heading, write

TEXT = (
    "the order of what can you help with delivery late refund please account a to and is it my we will send again "
    "tomorrow invoice number thanks sorry about this problem café “quoted” naïve how do I bake bread without yeast"
)
WORDS = TEXT.split()


def write_rows(path: Path, rows: int) -> None:
    """Writes `rows` transcripts in the schema of Anthropic's HH-RLHF, as long on average as those of helpful-base.

    Both sides together: 1,500 characters, five human turns; nearly all hold characters beyond ASCII, as 83% there do.
    """
    draw = random.Random(0)
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


def run_pinned(*command: str) -> dict[str, float]:
    """Runs `steersman data COMMAND` in a child process pinned to one core and measures it."""
    code = "from steersman.cli import main; main()"
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.execv(sys.executable, [sys.executable, "-c", code, "data", *command])
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:2])} failed with status {status}")
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def main() -> None:
    parser = command_line(__doc__, "import_data")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--near-duplicates", type=float, help="leave near copies out, too: their least similarity")
    parser.add_argument("--workdir", type=Path, help="where the files go; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
        source, out = Path(folder, "rows.jsonl.gz"), Path(folder, "out")
        write_rows(source, arguments.rows)
        near = () if arguments.near_duplicates is None else ("--near-duplicates", str(arguments.near_duplicates))
        figures = run_pinned("import", "hh", str(source), "--out", str(out), "--quiet", *near)
        summary = json.loads((out / "import.json").read_bytes())
        source.unlink()
        store = f"sqlite:///{folder}/store.db"
        released = run_pinned(
            "release", "bench", "--store", store, "--out", f"{folder}/releases",
            "--source", str(out / "train.jsonl"), "--source", str(out / "test.jsonl"),
        )  # fmt: skip
    figures |= {name: summary[name] for name in ("written", "duplicates", "near_duplicates")} | {
        "rows": summary["read"]
    }
    figures |= {f"rows_per_{clock}_s": summary["read"] / figures[f"{clock}_s"] for clock in ("wall", "cpu")}
    figures |= {f"release_{name}": value for name, value in released.items()}
    figures |= {f"release_rows_per_{clock}_s": summary["written"] / released[f"{clock}_s"] for clock in ("wall", "cpu")}
    write(heading(1, "orjson") | {name: round(value, 1) for name, value in figures.items()}, arguments.out)
    print(
        f"{summary['read']:,} rows read, {summary['written']:,} written, {summary['duplicates']:,} duplicates; "
        f"{figures['rows_per_wall_s']:,.0f} rows/s wall, {figures['rows_per_cpu_s']:,.0f} rows/s of one core, "
        f"peak {figures['peak_mib']:.0f} MiB\n"
        f"released: {figures['release_rows_per_wall_s']:,.0f} rows/s wall, {figures['release_rows_per_cpu_s']:,.0f} "
        f"rows/s of one core, peak {figures['release_peak_mib']:.0f} MiB"
    )


if __name__ == "__main__":
    main()
