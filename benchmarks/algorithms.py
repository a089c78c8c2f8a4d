"""SFT, rejection sampling, the online methods and DPO on the demo's task, with the same token budget and several seeds.

    python -m benchmarks.algorithms                        # everything; resumes where it was stopped
    python -m benchmarks.algorithms --methods ilql,offline-sft --seeds 17 --jobs 1      # a part; joins what is there
    python -m benchmarks.algorithms_base build/bench/base && python -m benchmarks.algorithms --base build/bench/base

The last line takes a small model of its own instead of the default one, which trains in seconds a cell; it writes the
shop's language, but seldom copies a value from the record, on which most of the rubric stands.

Every method of a seed starts from the same SFT model (`start`) and has the same reward model (`judge`); both are
trained once a seed. The budget counts answers that pass through the policy, generated or learned from, and so tokens
(answers are as long as the data's, about 20 tokens): an on-policy step spends it twice on each sample, DPO twice on
each pair, rejection sampling on every candidate and then on the winners. All train a LoRA adapter at the same rank.

`offline-sft` and `ilql` go on from the SFT model with the 640 answers of the demo's judged comparisons, good and bad,
and nothing else: the same answers in equally many steps, a budget of its own (--offline-steps). `ilql_minus_sft`
is the difference of their rubrics. They need no reward model; asked for alone, none is trained, and the table has no
reward.

Evaluation is apart from the training code (`benchmarks.algorithms_scores`). The intervals are 95% over the prompts of
all seeds; beside them stand the seeds' own means.

Each cell (method, seed) is a file `cell.json` below --out and is not done again. The table is written anew after each,
from all cells there that were made with the same options. What needs services runs through `steersman run`; stages that
learn from files run here, one at a time, as `steersman run` would run them. Either computes with one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import yaml

from benchmarks.processes import alignment_run
from benchmarks.report import command_line, heading
from steersman.artifacts import write_whole

ONLINE = ("ppo", "nlpo", "rloo", "grpo", "dapo", "gspo", "cispo", "reinforce-plus-plus", "online-dpo")
OFFLINE = ("offline-sft", "ilql")
"""From the answers of the judged comparisons alone: imitation of all of them, and ILQL, which knows who won."""
SERVED = ("rejection-sampling", *ONLINE)
"""What samples, through services."""
METHODS = ("sft", *SERVED, "dpo", *OFFLINE)
HERE = threading.Lock()
"""Torch's seeds and settings are the process's own: one cell at a time."""
OPTIONS = ("base", "learning_rate", "budget", "start_steps", "offline_steps", "prompts")
"""What a cell depends on besides method and seed."""
ILQL = {"learnFrom": ["preferences"]}
"""All else as it comes."""
GENERATION = {"maxNewTokens": 40, "temperature": 0.7}
COLUMNS = ("reward", "rubric", "kl", "length", "cut")
"""What is measured of each answer; see `benchmarks.algorithms_scores`."""


def stages_of(method: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The stages that a method adds to SFT and reward model."""
    if method in ("start", "judge"):
        return []
    adam = {"learningRate": arguments.learning_rate, "schedule": "constant", "warmupRatio": 0.0}
    budget = arguments.budget
    if method == "sft":
        return [{"sft": {"optimizer": adam, "batchSize": 8, "maxSteps": budget // 8}}]
    if method in OFFLINE:
        sizes = {"optimizer": adam, "batchSize": 16, "microBatchSize": 16, "maxSteps": arguments.offline_steps}
        return [{"sft": sizes} if method == "offline-sft" else {"ilql": {**sizes, **ILQL}}]
    if method == "dpo":
        return [{"dpo": {"optimizer": adam, "batchSize": 8, "maxSteps": budget // 16}}]
    if method == "rejection-sampling":
        # Two rounds of 6 candidates a prompt; the second one learns from both rounds' winners: 15 answers a prompt.
        options = {"rounds": 2, "promptsPerRound": max(1, budget // 15), "samplesPerPrompt": 6, "batchSize": 8}
        return [{"rejectionSampling": {**options, "optimizer": adam, "generation": GENERATION}}]
    options: dict[str, Any] = {"steps": budget // 32, "promptsPerStep": 4, "samplesPerPrompt": 4, "klCoefficient": 0.1}
    if method in ("ppo", "nlpo"):
        options[method] = {"critic": {"kind": "valueHead", "learningRate": 1e-3}}
    if method == "dapo":
        options["dapo"] = {"maxRounds": 1}  # further rounds would pass the budget
    return [{"rl": {"algorithm": method, "optimizer": adam, "generation": GENERATION, **options}}]


def manifest(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """The run of a cell; `start` (SFT) and `judge` (a reward model behind it) are what a seed's methods share."""
    sizes = {"optimizer": {"learningRate": 1e-3}, "batchSize": 8, "maxSteps": arguments.start_steps}
    shared: list[dict[str, Any]] = [{"sft": sizes}] if method == "start" else [{"sft": sizes}, {"rewardModel": sizes}]
    data: dict[str, Any] = {"demo": {"heldoutPrompts": arguments.prompts}}
    folder, start = Path(arguments.base).absolute(), shared_run(arguments, "start", seed)
    base = str(folder) if folder.is_dir() else arguments.base
    if method in OFFLINE:  # its data are files of its own, so it begins as a run of its own at the SFT model
        shared, base = [], str(start / "sft" / "model")
        judged = {"preferences": {"train": str(start / "data" / "preferences.train.jsonl")}}
        said = {"demonstrations": {"train": str(arguments.out / f"seed-{seed}" / method / "demonstrations.jsonl")}}
        data = judged if method == "ilql" else said
    spec = {
        "seed": seed,
        "model": {"base": base, "threads": 1, "precision": "fp32", "device": "cpu"},
        "data": data,
        "stages": shared + stages_of(method, arguments),
        "services": {"startTimeoutSeconds": 1800},
    }
    return alignment_run(f"bench-{method}", spec)


def shared_run(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    """The run `start` or `judge` of a seed."""
    return arguments.out / f"seed-{seed}" / name / "run"


class CellFailed(Exception):
    """A cell could not be trained or evaluated."""


def done(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any] | None:
    """The cell's content, where it was made by the manifest that these options give."""
    path = arguments.out / f"seed-{seed}" / method / "cell.json"
    cell = json.loads(path.read_text()) if path.is_file() else None
    return cell if cell and cell["manifest"] == manifest(arguments, method, seed) else None


def run_cell(arguments: argparse.Namespace, method: str, seed: int) -> None:
    """Trains and evaluates, unless it is done."""
    if done(arguments, method, seed):
        return
    folder = arguments.out / f"seed-{seed}" / method
    start, judge = (shared_run(arguments, name, seed) for name in ("start", "judge"))
    wanted = manifest(arguments, method, seed)
    document, run = folder / "run.yaml", folder / "run"
    if document.is_file() and yaml.safe_load(document.read_text()) != wanted:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if method == "offline-sft":
        write_judged_answers(start / "data", folder)
    if method not in ("start", *OFFLINE) and not run.is_dir():
        copied = folder / "run.partial"
        shutil.rmtree(copied, ignore_errors=True)
        copied.mkdir()
        for part in ("data", "prepared.json", "sft", *(() if method == "judge" else ("reward-model",))):
            of = judge if part == "reward-model" else start
            (shutil.copytree if (of / part).is_dir() else shutil.copy2)(of / part, copied / part)
        copied.rename(run)
    document.write_text(yaml.safe_dump(wanted))
    began = time.monotonic()
    with (folder / "log.txt").open("a") as log:
        if method in SERVED:
            command = [sys.executable, "-m", "steersman", "run", "-f", document, "--run-dir", run]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            failed = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        else:
            failed = train_here(document, run, log)
    if failed:
        raise CellFailed(f"{method}, seed {seed}: failed, see {folder / 'log.txt'}")
    seconds = time.monotonic() - began
    with HERE:
        from benchmarks.algorithms_scores import evaluate

        scores = evaluate(run, start, judge)
    cell = {"method": method, "seed": seed, "manifest": wanted, **scores, "seconds": round(seconds, 1)}
    write_whole(folder / "cell.json", json.dumps(cell))
    if method not in ("start", "judge"):
        shutil.rmtree(run)  # a cell's models take 2 GB
    print(f"{method}, seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)


def train_here(document: Path, run: Path, log: TextIO) -> int:
    """Stages without services in this process; what they say goes to the log. Returns an exit code."""
    with HERE, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        from steersman.config.base import dump_yaml
        from steersman.config.manifest import load_manifest
        from steersman.errors import SteersmanError
        from steersman.local.prepare import prepare
        from steersman.progress import ConsoleReporter
        from training.stage import run_stage

        try:
            manifest = load_manifest(document)
            run.mkdir(exist_ok=True)
            (run / "manifest.yaml").write_text(dump_yaml(manifest))
            with ConsoleReporter("prepare") as reporter:
                prepare(manifest, run, reporter)
            for name in manifest.stage_names():
                run_stage(run, name, [])
        except SteersmanError as error:
            print(error, file=log)
            return error.exit_code
    return 0


def write_judged_answers(demo: Path, folder: Path) -> None:
    """What the offline methods learn from, as demonstrations: both answers of every comparison."""
    from steersman.data import records

    pairs = records.read_jsonl(demo / "preferences.train.jsonl", records.Preference)
    answers = ([*row.prompt, *said] for row in pairs for said in (row.chosen, row.rejected))
    records.write_jsonl(folder / "demonstrations.jsonl", (records.Demonstration(messages=turns) for turns in answers))


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: means with their intervals over all prompts and seeds, and the means of the seeds."""
    from steersman.statistics import mean_interval

    found = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        row: dict[str, Any] = {"method": method, "seeds": [cell["seed"] for cell in own]}
        for name in COLUMNS:
            with_it = [cell[name] for cell in own if cell[name]]
            row[name] = (
                [round(value, 4) for value in mean_interval(list(chain.from_iterable(with_it)))] if with_it else None
            )
            row[f"{name}_by_seed"] = [round(sum(values) / len(values), 4) for values in with_it]
        row["seconds"] = [cell["seconds"] for cell in own]
        found.append(row)
    return found


def difference(cells: list[dict[str, Any]], one: str, other: str) -> list[float] | None:
    """Mean and 95% interval of the rubric's difference, prompt by prompt over the seeds; None: one was not run."""
    from steersman.statistics import mean_interval

    rubric = {(cell["method"], cell["seed"]): cell["rubric"] for cell in cells}
    seeds = sorted({seed for method, seed in rubric if method == one} & {s for m, s in rubric if m == other})
    pairs = [(a, b) for seed in seeds for a, b in zip(rubric[one, seed], rubric[other, seed], strict=True)]
    return [round(value, 4) for value in mean_interval([a - b for a, b in pairs])] if pairs else None


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""

    def interval(values: list[float] | None, digits: int = 2) -> str:
        return "—" if values is None else f"{values[0]:.{digits}f} ± {values[0] - values[1]:.{digits}f}"

    head = ("method", "reward", "by seed", "rubric", "KL, nats", "tokens", "cut short", "seconds")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        by_seed = " ".join(f"{value:.2f}" for value in row["reward_by_seed"])
        seconds = statistics.median(row["seconds"])
        numbers = (interval(row["reward"]), by_seed, interval(row["rubric"]), interval(row["kl"]))
        lines.append((row["method"], *numbers, interval(row["length"], 1), f"{row['cut'][0]:.1%}", f"{seconds:.0f}"))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def write_figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of all cells below --out that were made with these options, of whatever methods and seeds."""
    seeds = sorted(int(folder.name.removeprefix("seed-")) for folder in arguments.out.glob("seed-*"))
    found = [done(arguments, method, seed) for method in METHODS for seed in seeds]
    # The same model, with the reward model beside it.
    begun = [done(arguments, "judge", seed) or done(arguments, "start", seed) for seed in seeds]
    cells = [{**cell, "method": "start"} for cell in begun if cell] + [cell for cell in found if cell]
    report = {
        **heading(1),
        **{name: getattr(arguments, name) for name in OPTIONS},
        "ilql": ILQL,
        "table": table(cells),
        "ilql_minus_sft": difference(cells, "ilql", "offline-sft"),
    }
    figures = arguments.out.with_suffix(".json")
    figures.write_text(json.dumps(report, indent=1) + "\n")
    return report


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--seeds", default="17,29,43", help="comma-separated")
    parser.add_argument("--budget", type=int, default=256, help="answers through the policy, a multiple of 32")
    parser.add_argument("--start-steps", type=int, default=30, help="steps of 8 rows of SFT and of the reward model")
    parser.add_argument(
        "--offline-steps", type=int, default=200, help="steps of 16 judged answers of offline-sft and ilql"
    )
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts a seed")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of all methods behind the start")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="cells at the same time")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="base model")
    parser.add_argument("--out", type=Path, default=Path("build/bench/algorithms"), help="folder of the cells")
    arguments = parser.parse_args()
    arguments.out = arguments.out.absolute()
    arguments.methods = arguments.methods.split(",")
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    unknown = sorted(set(arguments.methods) - {"start", *METHODS})
    if unknown or arguments.budget % 32:
        parser.error(f"unknown method {unknown[0]}" if unknown else "--budget must be a multiple of 32")
    return arguments


def main() -> None:
    arguments = parse()
    failures: list[str] = []

    def attempt(cell: tuple[str, int]) -> None:
        try:
            run_cell(arguments, *cell)
            write_figures(arguments)
        except CellFailed as failure:
            failures.append(str(failure))
            print(failure, file=sys.stderr, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(attempt, [("start", seed) for seed in arguments.seeds]))
        begun = [seed for seed in arguments.seeds if done(arguments, "start", seed)]
        if set(arguments.methods) - {"start", *OFFLINE}:
            list(pool.map(attempt, [("judge", seed) for seed in begun]))
            begun = [seed for seed in begun if done(arguments, "judge", seed)]
        list(pool.map(attempt, [(method, seed) for method in arguments.methods if method != "start" for seed in begun]))
    report = write_figures(arguments)
    show(report["table"])
    print(f"\nilql_minus_sft: {report['ilql_minus_sft']}\n{arguments.out.with_suffix('.json')}")
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
