"""SFT, rejection sampling, the online methods and DPO on the demo's task, with the same token budget and several seeds.

    python -m benchmarks.algorithms                        # everything; resumes where it was stopped
    python -m benchmarks.algorithms --methods ppo,dpo --seeds 17 --jobs 1
    python -m benchmarks.algorithms --base FOLDER --budget 32 --prompts 8    # a tiny model, to try the script

Every method of a seed but the offline ones starts from the same SFT model and has the same reward model; both are
trained once a seed. Their budget counts answers that pass through the policy, generated or learned from, and so tokens
(answers are as long as the data's, about 20 tokens): an on-policy step spends it twice on each sample, DPO twice on
each pair, rejection sampling on every candidate and then on the winners. All train a LoRA adapter at the same rank.

`offline-sft` and `ilql` learn from the demo's 640 rated answers and nothing else, the same rows in the same number of
steps, from the base model; `ilql_minus_sft` is the difference of their rubrics.

Evaluation is apart from the training code: the merged model answers held-out prompts by transformers' own `generate`;
the reward model, the exact rubric (which no method sees) and the KL to the SFT model are computed here. The intervals
are 95% over the prompts of all seeds; beside them stand the seeds' own means.

Each cell (method, seed) is a file `cell.json` below --out and is not done again. Training runs through `steersman run`
with one thread a process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import heading

ONLINE = ("ppo", "nlpo", "rloo", "grpo", "dapo", "gspo", "cispo", "reinforce-plus-plus", "online-dpo")
OFFLINE = ("offline-sft", "ilql")
"""From the answers of the judged comparisons alone, and what they were rated: imitation of all, and ILQL."""
METHODS = ("sft", "rejection-sampling", *ONLINE, "dpo", *OFFLINE)
GENERATION = {"maxNewTokens": 40, "temperature": 0.7}
EVALUATION_SEED = 5
EVALUATION_BATCH = 16


def stages_of(method: str, budget: int) -> list[dict[str, Any]]:
    """The stages that a method adds to SFT and reward model."""
    if method == "start":
        return []
    adam = {"learningRate": 3e-4, "schedule": "constant", "warmupRatio": 0.0}
    if method == "sft":
        return [{"sft": {"optimizer": adam, "batchSize": 8, "maxSteps": budget // 8}}]
    if method in OFFLINE:
        # The same rows and as many passes: imitation, then imitation with Q and V beside it.
        sizes = {"optimizer": adam, "batchSize": 16, "microBatchSize": 16, "maxLength": 1024}
        first, steps = {"sft": {**sizes, "maxSteps": max(2, budget // 16)}}, max(2, budget // 4)
        if method == "offline-sft":
            return [first, {"sft": {**sizes, "maxSteps": steps}}]
        values = {"beta": 8.0, "expectile": 0.8, "learnFrom": ["returns"], "headsLearningRate": 2e-3}
        return [first, {"ilql": {**sizes, "maxSteps": steps, **values}}]
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
    """The run of a cell; `start` is what all of a seed share, but for the offline methods, which begin at the base."""
    adam = {"learningRate": 1e-3}
    steps = 2 if arguments.budget < 64 else 30
    shared = [
        {"sft": {"optimizer": adam, "batchSize": 8, "maxSteps": steps}},
        {"rewardModel": {"optimizer": adam, "batchSize": 8, "maxSteps": steps}},
    ]
    data: dict[str, Any] = {"demo": {"heldoutPrompts": arguments.prompts}}
    if method in OFFLINE:
        shared = []
        data = {kind: {"train": f"{kind}.jsonl"} for kind in ("demonstrations", "returns")}
    return {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": f"bench-{method}"},
        "spec": {
            "seed": seed,
            "model": {"base": arguments.base, "threads": 1, "precision": "fp32", "device": "cpu"},
            "data": data,
            "stages": shared + stages_of(method, arguments.budget),
            "services": {"startTimeoutSeconds": 1800},
        },
    }


class CellFailed(Exception):
    """A cell could not be trained or evaluated."""


def run_cell(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Trains and evaluates; returns the cell's content, from its file where that was made by the same manifest."""
    folder = arguments.out / f"seed-{seed}" / method
    wanted = manifest(arguments, method, seed)
    path = folder / "cell.json"
    if path.is_file():
        cell = json.loads(path.read_text())
        if cell["manifest"] == wanted:
            return cell
        shutil.rmtree(folder)
    run = folder / "run"
    start = arguments.out / f"seed-{seed}" / "start" / "run"
    if method in OFFLINE:
        write_offline_rows(start / "data", folder)
    elif method != "start" and not run.is_dir():
        run.mkdir(parents=True)
        for part in ("data", "prepared.json", "sft", "reward-model"):
            (shutil.copytree if (start / part).is_dir() else shutil.copy2)(start / part, run / part)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(wanted))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with (folder / "log.txt").open("a") as log:
        for command in (
            [Path(sys.executable).with_name("steersman"), "run", "-f", folder / "run.yaml", "--run-dir", run],
            [sys.executable, "-m", "benchmarks.algorithms", "--evaluate", run, "--start", start],
        ):
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
            if done.returncode:
                raise CellFailed(f"{method}, seed {seed}: failed, see {folder / 'log.txt'}")
    cell = {"method": method, "seed": seed, "manifest": wanted, **json.loads((run / "scores.json").read_text())}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(cell))
    partial.rename(path)
    if method != "start":
        shutil.rmtree(run)  # a cell's models take 2 GB
    print(f"{method}, seed {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return cell


def write_offline_rows(demo: Path, folder: Path) -> None:
    """What the offline methods learn from: every rated answer as a demonstration, and with what it was worth."""
    from steersman.data import records
    from steersman.data.returns import returns_of

    folder.mkdir(parents=True, exist_ok=True)
    rated = records.read_jsonl(demo / "aspects.train.jsonl", records.Aspects)
    returns = [one for row in rated for one in returns_of(row, {})]
    records.write_jsonl(folder / "returns.jsonl", returns)
    said = (records.Demonstration(messages=[*row.prompt, *row.completion]) for row in returns)
    records.write_jsonl(folder / "demonstrations.jsonl", said)


def evaluate(run: Path, start: Path) -> None:
    """Answers the held-out prompts with a run's last model and writes `scores.json`.

    Args:
        start: the seed's shared run: data, the reward model, and the SFT model that the KL is measured to.
    """
    import torch

    from steersman.config.manifest import load_manifest
    from steersman.data import records
    from steersman.nn.load import load_causal_lm, load_reward_model, load_tokenizer
    from steersman.nn.tokens import prompt_ids, stop_ids
    from steersman.rewards import build_reward

    torch.set_num_threads(1)
    torch.manual_seed(EVALUATION_SEED)
    manifest = load_manifest(run / "manifest.yaml")
    names = manifest.stage_names()
    last = next(run / name / "model" for name in reversed(names) if name != "reward-model")
    tokenizer = load_tokenizer(last)
    policy, reference = with_heads(load_causal_lm(last), last), load_causal_lm(start / "sft" / "model")
    rubric, reward_model = build_reward("demo-rubric"), load_reward_model(start / "reward-model" / "model")
    stops = stop_ids(tokenizer, policy.generation_config)
    rows = list(records.read_jsonl(start / "data" / "prompts.heldout.jsonl", records.Prompt))
    chats = [[message.model_dump(exclude_none=True) for message in row.prompt] for row in rows]
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    columns: dict[str, list[float]] = {name: [] for name in ("reward", "rubric", "kl", "length", "cut")}
    for row, chat, prompt, answer in zip(rows, chats, prompts, sample(policy, prompts, stops), strict=True):
        text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        columns["reward"].append(reward_model.score([prompt + answer]).reward.item())
        columns["rubric"].append(rubric(chat, text, row.facts or {}).value)
        columns["kl"].append(logprob(policy, prompt, answer) - logprob(reference, prompt, answer))
        columns["length"].append(float(len(answer)))
        columns["cut"].append(float(answer[-1] not in stops))
    seconds = json.loads((run / "usage.json").read_text())["seconds"]
    shared = 0 if "reward-model" not in names else 2
    trained = sum(seconds.get(name, 0.0) for name in names[shared:])
    (run / "scores.json").write_text(json.dumps({**columns, "seconds": trained}))


def with_heads(policy: Any, folder: Path) -> Any:
    """The model with ILQL's advantages in its logits, where its folder has heads: `generate` draws with them."""
    from steersman.nn.ilql import AdvantageHeads, read_heads

    tensors = read_heads(folder)
    if not tensors:
        return policy
    text = policy.config.get_text_config(decoder=True)
    heads = AdvantageHeads.of(tensors, text.hidden_size, text.vocab_size)
    forward = policy.forward

    @functools.wraps(forward)
    def steered(*inputs: Any, **options: Any) -> Any:
        output = forward(*inputs, **{**options, "output_hidden_states": True})
        output.logits = output.logits + heads(output.hidden_states[-1][:, -output.logits.shape[1] :])
        return output

    policy.forward = steered
    return policy


def sample(policy: Any, prompts: list[list[int]], stops: list[int]) -> Iterator[list[int]]:
    """An answer to every prompt, its end token included."""
    import torch

    for first in range(0, len(prompts), EVALUATION_BATCH):
        batch = prompts[first : first + EVALUATION_BATCH]
        width = max(map(len, batch))
        answers = policy.generate(
            torch.tensor([[stops[0]] * (width - len(prompt)) + prompt for prompt in batch]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]),
            do_sample=True,
            temperature=GENERATION["temperature"],
            top_k=0,
            top_p=1.0,
            max_new_tokens=GENERATION["maxNewTokens"],
            eos_token_id=stops,
            pad_token_id=stops[0],
        )[:, width:].tolist()
        for answer in answers:
            end = next((place for place, token in enumerate(answer) if token in stops), len(answer) - 1)
            yield answer[: end + 1]


def logprob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Log-probability of the answer at the temperature of the sampling, in nats."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
    logprobs = (logits / GENERATION["temperature"]).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item()


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: means with their intervals over all prompts and seeds, and the means of the seeds."""
    from steersman.statistics import mean_interval

    found = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        row: dict[str, Any] = {"method": method, "seeds": [cell["seed"] for cell in own]}
        for name in ("reward", "rubric", "kl", "length", "cut"):
            row[name] = [round(value, 4) for value in mean_interval([v for cell in own for v in cell[name]])]
            row[f"{name}_by_seed"] = [round(sum(cell[name]) / len(cell[name]), 4) for cell in own]
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

    def interval(values: list[float], digits: int = 2) -> str:
        return f"{values[0]:.{digits}f} ± {values[0] - values[1]:.{digits}f}"

    head = ("method", "reward", "by seed", "rubric", "KL, nats", "tokens", "cut short", "seconds")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        by_seed = " ".join(f"{value:.2f}" for value in row["reward_by_seed"])
        seconds = statistics.median(row["seconds"])
        numbers = (interval(row["reward"]), by_seed, interval(row["rubric"]), interval(row["kl"]))
        lines.append((row["method"], *numbers, interval(row["length"], 1), f"{row['cut'][0]:.1%}", f"{seconds:.0f}"))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--seeds", default="17,29,43", help="comma-separated")
    parser.add_argument("--budget", type=int, default=256, help="answers through the policy, a multiple of 32")
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts a seed")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="cells at the same time")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="base model")
    parser.add_argument("--out", type=Path, default=Path("build/bench/algorithms"), help="folder of the cells")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.evaluate:
        return evaluate(arguments.evaluate, arguments.start)
    methods, seeds = arguments.methods.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    unknown = sorted(set(methods) - set(METHODS))
    if unknown or arguments.budget % 32:
        parser.error(f"unknown method {unknown[0]}" if unknown else "--budget must be a multiple of 32")
    arguments.out = arguments.out.absolute()
    failures: list[str] = []

    def attempt(cell: tuple[str, int]) -> list[dict[str, Any]]:
        try:
            return [run_cell(arguments, *cell)]
        except CellFailed as failure:
            failures.append(str(failure))
            print(failure, file=sys.stderr, flush=True)
            return []

    with ThreadPoolExecutor(arguments.jobs) as pool:
        cells = [cell for found in pool.map(attempt, [("start", seed) for seed in seeds]) for cell in found]
        wanted = [(method, cell["seed"]) for cell in cells for method in methods]
        cells += [cell for found in pool.map(attempt, wanted) for cell in found]
    rows = table(cells)
    result = {
        **heading(1),
        "base": arguments.base,
        "budget": arguments.budget,
        "prompts": arguments.prompts,
        "table": rows,
        "ilql_minus_sft": difference(cells, "ilql", "offline-sft"),
    }
    figures = arguments.out.with_suffix(".json")
    figures.write_text(json.dumps(result, indent=1))
    show(rows)
    print(f"\nilql_minus_sft: {result['ilql_minus_sft']}\n{figures}")
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
