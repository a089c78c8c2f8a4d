"""A step of SFT, reward model, DPO and KTO: TRL over padded rows against the stages' own trainers over packed ones.

    python -m benchmarks.train_stages [--model FOLDER] [--rounds 3]

Work: 12 prompts of about 60 tokens with two answers each of natural lengths (median 24, at most 96 tokens), LoRA as the
stages default to it; the loss of one micro-batch and its gradients. `before` is TRL's trainer as it comes: rows padded,
prompts repeated, the head at all positions. `after` is the stage's: rows packed, the prompt of a pair once, the head
only where a loss is. Each runs in a process of its own, so that its peak memory is its own; both process the same
tokens, and their losses are compared. `memory` is the peak above the loaded model. Part of `make bench-train`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.processes import in_own_process
from benchmarks.report import base_model, command_line, table

STAGES = ("sft", "reward model", "dpo", "kto")
PROMPTS, PROMPT_TOKENS, LONGEST = 12, 60, 96


def rows(vocabulary: int) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts, each with its two answers."""
    generator = np.random.default_rng(0)
    lengths = iter(common.natural_lengths(2 * PROMPTS, LONGEST))

    def tokens(count: int) -> list[int]:
        return generator.integers(3, vocabulary, count).tolist()

    return [(tokens(PROMPT_TOKENS), [tokens(next(lengths)) for _ in range(2)]) for _ in range(PROMPTS)]


def trainer_of(stage: str, folder: Path, packed: bool, scratch: str) -> tuple[Any, list[dict[str, Any]]]:
    """The trainer of a stage and its micro-batch."""
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from steersman.config.manifest import DpoStage, Lora, RewardModelStage
    from steersman.nn.dropout import disable_dropout
    from steersman.nn.load import load_causal_lm, load_classifier, load_tokenizer
    from steersman.nn.lora import attach_lora
    from steersman.nn.tokens import distinct_pad_token
    from training.offline.dpo import PreferenceTrainer
    from training.offline.reward_model import PairwiseTrainer, read_last_token
    from training.offline.trl_setup import project_labelled_positions_only, quicken

    if packed:
        project_labelled_positions_only()
    else:  # TRL projects all positions where Triton does not run
        trl.trainer.utils._use_triton = lambda device: False  # type: ignore[attr-defined]
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    if stage == "reward model":
        tokenizer.pad_token = distinct_pad_token(tokenizer) or tokenizer.pad_token
        model: Any = load_classifier(folder, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
        if packed:
            read_last_token(model)
    else:
        model = load_causal_lm(folder)
    data = rows(model.config.vocab_size)
    model = attach_lora(model, Lora())
    disable_dropout(model)
    if packed:
        quicken(model)
    common_options: dict[str, Any] = {
        "output_dir": scratch, "use_cpu": True, "bf16": False, "report_to": [], "max_length": None,
        "gradient_checkpointing": False, "remove_unused_columns": False, "disable_dropout": False,
    }  # fmt: skip
    own: dict[str, Any] = {}
    if stage == "sft":
        batch = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, answers in data for a in answers]
        common_options.pop("disable_dropout")
        kind, arguments = SFTTrainer, SFTConfig(**common_options, dataset_kwargs={"skip_prepare_dataset": True})
    elif stage == "reward model":
        batch = [{"chosen_ids": p + one, "rejected_ids": p + other, "soft_label": 1.0} for p, (one, other) in data]
        arguments = RewardConfig(**common_options, center_rewards_coefficient=0.01)
        own = {"spec": RewardModelStage()} if packed else {}
        kind = PairwiseTrainer if packed else _unprepared(RewardTrainer)
    elif stage == "dpo":
        batch = [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": b, "soft_label": 1.0} for p, (a, b) in data]
        arguments = DPOConfig(**common_options)
        own = {"spec": DpoStage()} if packed else {}
        kind = PreferenceTrainer if packed else _unprepared(DPOTrainer)
    else:
        answers = [(p, a, number == 0) for p, both in data for number, a in enumerate(both)]
        batch = [
            {"prompt_ids": p, "completion_ids": a, "KL_completion_ids": answers[index - 1][1], "label": label}
            for index, (p, a, label) in enumerate(answers)
        ]
        kind, arguments = _unprepared(KTOTrainer), KTOConfig(**common_options, per_device_train_batch_size=len(batch))
    made = kind(model=model, args=arguments, train_dataset=Dataset.from_list(batch), processing_class=tokenizer, **own)
    return made, batch


def _unprepared(kind: Any) -> Any:
    """The trainer over rows that hold token ids already."""
    return type(kind.__name__, (kind,), {"_prepare_dataset": lambda self, dataset, *args, **kwargs: dataset})


def run(stage: str, folder: Path, packed: bool, rounds: int) -> dict[str, float]:
    """In this process: median of the rounds after one warm-up."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer, batch = trainer_of(stage, folder, packed, scratch)
        trainer.model.train()
        common.reset_peak()
        loaded = common.peak_gib()
        step = _step(trainer, batch)
        seconds, loss = [], 0.0
        for _ in range(rounds + 1):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        peak = common.peak_gib()
    tokens = sum(
        len(prompt) + len(answer) for prompt, answers in rows(trainer.model.config.vocab_size) for answer in answers
    )
    median = statistics.median(seconds[1:])
    return {
        "seconds": median, "tokens": tokens, "tokens_per_second": tokens / median, "loss": loss,
        "peak_gib": peak, "memory_gib": peak - loaded,
    }  # fmt: skip


def _step(trainer: Any, batch: list[dict[str, Any]]) -> Callable[[], float]:
    def step() -> float:
        loss = trainer.compute_loss(trainer.model, dict(trainer.data_collator([dict(row) for row in batch])))
        loss.backward()
        trainer.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(folder: Path, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """Every stage before and after, in turns."""
    found: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        both = {}
        for name, packed in (("before", False), ("after", True)):
            request = {"stage": stage, "folder": str(folder), "packed": packed, "rounds": rounds}
            both[name] = in_own_process("benchmarks.train_stages", request, threads)
        found[stage] = {
            **both,
            "speedup": both["after"]["tokens_per_second"] / both["before"]["tokens_per_second"],
            "memory": both["after"]["memory_gib"] / max(both["before"]["memory_gib"], 1e-9),
            "loss_difference": abs(both["after"]["loss"] - both["before"]["loss"]),
        }
        print(f"{stage}: {found[stage]['speedup']:.2f} times, memory {found[stage]['memory']:.2f}", flush=True)
    return found


def show(found: dict[str, dict[str, Any]]) -> None:
    header = ("stage", "before tokens/s", "after tokens/s", "times", "before GiB", "after GiB", "loss differs by")
    table(
        header,
        [
            [
                stage, one["before"]["tokens_per_second"], one["after"]["tokens_per_second"], one["speedup"],
                one["before"]["memory_gib"], one["after"]["memory_gib"], one["loss_difference"],
            ]
            for stage, one in found.items()
        ],
    )  # fmt: skip


def main() -> None:
    parser = command_line(__doc__, rounds=3, model=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        request = json.loads(arguments.child)
        print(json.dumps(run(request["stage"], Path(request["folder"]), request["packed"], request["rounds"])))
        return

    show(measure(base_model(arguments), arguments.rounds, arguments.threads))


if __name__ == "__main__":
    main()
