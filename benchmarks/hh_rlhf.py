"""A reward model and 30 PPO steps on Anthropic's HH-RLHF (helpful-base), from the default model.

    python -m benchmarks.hh_rlhf ../shared/data/hh-rlhf/helpful-base [--steps 30] [--pairs 480] [--set PATH=VALUE]

Imports `train.jsonl.gz` and `test.jsonl.gz` of the folder, trains a reward model on the train file and measures its
accuracy on every pair of the test file, runs PPO on prompts of the train file, and compares the reward of the base and
the aligned model on prompts of the test file. Peers, measured on the same pairs: a coin and 'the longer (shorter)
answer wins'. A run that was stopped goes on where it was. Prints a table; writes build/bench/hh_rlhf.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.processes import alignment_run
from benchmarks.report import command_line, heading, write
from steersman.home import cache_folder
from steersman.nn.load import load_tokenizer
from steersman.nn.prepare import EMBEDDED_MODEL, resolve_model
from steersman.nn.tokens import prompt_ids
from steersman.report.schema import read_evaluation
from steersman.report.summary import summarise
from steersman.statistics import wilson_interval

OUT = Path("build/bench")
SIDES = ("chosen", "rejected")
MAX_PROMPT_TOKENS = 128
MAX_PAIR_TOKENS = 320
"""Longer train rows are left out: half the rows, a quarter of the work. The test file is measured whole."""


def steersman(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "steersman", *arguments], check=True)


def prepare_data(source: Path, out: Path, pairs: int) -> None:
    """Imports both files and writes `train.jsonl`, `test.jsonl` and the prompts of both."""
    tokenizer = load_tokenizer(resolve_model(EMBEDDED_MODEL, cache_folder()))
    for split in ("train", "test"):
        folder = out / f"import-{split}"
        if not folder.is_dir():
            file = str(source / f"{split}.jsonl.gz")
            steersman("data", "import", "hh", file, "--out", str(folder), "--splits", f"{split}=1")
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        prompts = [row for row in rows if len(prompt_ids(tokenizer, row["prompt"])) <= MAX_PROMPT_TOKENS]
        if split == "train":
            sides = [len(prompt_ids(tokenizer, row["prompt"] + row[side])) for row in rows for side in SIDES]
            rows = [
                row for row, *size in zip(rows, sides[::2], sides[1::2], strict=True) if max(size) <= MAX_PAIR_TOKENS
            ]
            rows = rows[:pairs]
        write_rows(out / f"{split}.jsonl", rows)
        write_rows(out / f"{split}-prompts.jsonl", [{"id": row["id"], "prompt": row["prompt"]} for row in prompts])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(steps: int, pairs: int, seed: int) -> dict[str, Any]:
    generation = {"maxNewTokens": 48, "temperature": 1.0}
    reward_model = {
        "initFrom": "base",
        "optimizer": {"learningRate": 3e-4},
        "maxSteps": pairs // 8,
        "batchSize": 8,
    }
    rl = {
        "steps": steps,
        "promptsPerStep": 12,
        "samplesPerPrompt": 4,
        "generation": generation,
        "ppo": {"critic": {"kind": "valueHead", "learningRate": 1e-3}},
        "optimizer": {"learningRate": 1e-3, "schedule": "constant", "warmupRatio": 0},
        "klCoefficient": 0.02,
        # Answers of this model run past the limit as a rule; the reward alone is measured here.
        "missingEosPenalty": 0,
    }
    spec = {
        "seed": seed,
        "data": {
            "preferences": {"train": "train.jsonl", "heldout": "test.jsonl"},
            "prompts": {"train": "train-prompts.jsonl", "heldout": "test-prompts.jsonl"},
        },
        "stages": [{"rewardModel": reward_model}, {"rl": rl}, {"evaluate": {"generation": generation}}],
    }
    return alignment_run("hh-rlhf", spec)


def result_of(run_dir: Path, seed: int) -> dict[str, Any]:
    evaluation = read_evaluation(run_dir / "evaluate" / "evaluation.json")
    summary, model = summarise(evaluation), evaluation.reward_model
    assert model is not None  # the manifest trains one
    accuracy = wilson_interval(model.accuracy * len(model.pairs), len(model.pairs))
    return {
        "seed": seed,
        "test_pairs": len(model.pairs),
        "rm_accuracy": [round(value, 4) for value in accuracy],
        "length_baseline": summary["length_baseline"],
        "reward": summary["reward"],
        "rlhf_minus_base": summary["rlhf_minus_base"],
        "kl": summary["kl"],
        "no_eos": summary["no_eos"],
        "seconds": summary["seconds"],
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title="HH-RLHF helpful-base, 95% intervals", title_justify="left", show_header=False)
    rows = {
        f"reward model's accuracy on {result['test_pairs']} test pairs": result["rm_accuracy"],
        "better length baseline": [result["length_baseline"]],
        "reward of the base model": result["reward"]["base"],
        "reward after PPO": result["reward"]["rlhf"],
        "difference, paired": result["rlhf_minus_base"],
    }
    for name, (mean, *interval) in rows.items():
        table.add_row(name, f"{mean:.3f}" + (f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""))
    Console().print(table)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("source", type=Path, help="folder with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--steps", type=int, default=30, help="PPO steps")
    parser.add_argument("--pairs", type=int, default=480, help="most pairs that the reward model trains on")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as for `steersman run`")
    arguments = parser.parse_args()
    work = OUT / f"hh_rlhf-{arguments.seed}"
    work.mkdir(parents=True, exist_ok=True)
    prepare_data(arguments.source, work, arguments.pairs)
    (work / "run.yaml").write_text(yaml.safe_dump(manifest(arguments.steps, arguments.pairs, arguments.seed)))
    overrides = [part for value in arguments.set for part in ("--set", value)]
    steersman("run", "-f", str(work / "run.yaml"), "--run-dir", str(work / "run"), *overrides)
    result = result_of(work / "run", arguments.seed)
    write(heading(os.cpu_count() or 1) | result, OUT / "hh_rlhf.json")
    show(result)


if __name__ == "__main__":
    main()
