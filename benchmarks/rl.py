"""A whole RLOO update against TRL's RLOOTrainer: generation, scoring, reference, optimizer step, weight sync.

    python -m benchmarks.rl [--prompts 3] [--new 64] [--rounds 5] [--precision auto]

Both train the same model (LoRA rank 16) in the precision that `auto` takes here, TRL's frozen weights in bf16, too, on
the same prompts with the same optimizer, learning rate, KL coefficient, reward and numbers of tokens, each with two
threads; TRL in one process, ours as in a run: trainer, policy, reward and reference service. They take turns. `equal`:
every answer has `--new` tokens; `natural`: the lengths of a chat model's answers, the same for both, enforced (TRL's
generation must end a row there, ours is asked for as much). TRL gets its batch in one pass and no gradient
checkpointing, which is its fastest way.

`ratio_*` is TRL's seconds over ours, the median over the rounds; `memory_ratio` the peak of our trainer over TRL's
process, `memory_ratio_with_services` that of all our processes together; `gemm_share` the rate of the update's useful
products (see benchmarks.train) over the machine's. The issue's size is `--prompts 16` (64 answers), about five times as
long. Prints tables and writes build/bench/rl.json.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.report import base_model, command_line, heading, table, write
from steersman.local.child import die_with_parent
from steersman.nn.hardware import DTYPES, Precision, pick_precision

SAMPLES, RATE, KL, RANK, ALPHA = 4, 1e-5, 0.05, 16, 32.0
PATTERN = "[aeiou] (order|the|you)"
"""The reward: 1 where it occurs. What it says does not matter, that both compute it does."""


@dataclass(frozen=True)
class Work:
    folder: Path
    prompts: int
    lengths: list[int]
    """Of the answers, the samples of a prompt one after the other."""
    threads: int
    steps: int
    samples: int = SAMPLES
    """Answers to each prompt."""
    reward_model: Path | None = None
    """PPO with this reward model, from which the critic starts; None: RLOO with `PATTERN`."""
    precision: Precision = "fp32"

    def messages(self) -> list[list[dict[str, str]]]:
        question = "What about order {}? It was promised for last week, I need it for a birthday, and nobody answers."
        return [[{"role": "user", "content": question.format(1000 + 37 * i)}] for i in range(self.prompts)]


# -- TRL ---------------------------------------------------------------------------------------------------------------


def trl_worker(pipe: Connection, work: Work) -> None:
    """Makes one update for every message; answers with seconds by phase."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    torch.set_num_threads(work.threads)
    tokenizer = AutoTokenizer.from_pretrained(work.folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=DTYPES[work.precision])
    timer = Timer()

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(re.search(PATTERN, one[0]["content"]) is not None) for one in completions]

    with tempfile.TemporaryDirectory() as folder:
        trainer = RLOOTrainer(
            model=model,
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": one} for one in work.messages()]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[turns(pipe, timer, work.steps)],
            args=RLOOConfig(
                **trl_options(folder, bf16=work.precision == "bf16"),
                per_device_train_batch_size=len(work.lengths),
                num_generations=SAMPLES,
                max_completion_length=max(work.lengths),
                max_steps=work.steps,
                beta=KL,
                top_p=1.0,
                top_k=0,
                shuffle_dataset=False,
            ),
        )
        _force_lengths(trainer, work.lengths)
        timer.wrap(trainer, "_generate", "generate")
        timer.wrap(trainer, "_get_per_token_logps_and_entropies", "old and reference log-probabilities", ungraded=True)
        trainer.train()


def turns(pipe: Connection, timer: Timer, steps: int) -> Any:
    """A callback for TRL's trainers: an update starts with a message and answers with its seconds."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            pipe.recv()
            timer.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            pipe.send(timer.stop() | {"peak_gib": common.peak_gib()})
            if state.global_step < steps:
                self.on_train_begin(args, state, control)

    return Turns()


def trl_options(folder: str, *, bf16: bool = False) -> dict[str, Any]:
    """What the configurations of TRL's trainers have in common here."""
    return {
        "output_dir": folder,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_epsilon": 1e-5,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "bf16": bf16,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _force_lengths(trainer: Any, lengths: list[int]) -> None:
    """Every row of TRL's batch gets its length; TRL generates through the model's own method."""
    from transformers import LogitsProcessorList

    inner = trainer.accelerator.unwrap_model(trainer.model)
    original = inner.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        eos = trainer.eos_token_ids[0] if isinstance(trainer.eos_token_ids, (list, tuple)) else trainer.eos_token_id
        return original(
            *args, **kwargs, logits_processor=LogitsProcessorList([common.ForcedLengths(lengths, int(eos))])
        )

    inner.generate = generate


class Timer:
    """Seconds of a step by phase; what no phase names is the update."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._started = 0.0

    def start(self) -> None:
        self._phases, self._started = {}, time.perf_counter()

    def stop(self) -> dict[str, float]:
        total = time.perf_counter() - self._started
        return {**self._phases, "update": total - sum(self._phases.values()), "seconds": total}

    def wrap(self, owner: Any, name: str, phase: str, ungraded: bool = False) -> None:
        import torch

        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if ungraded and torch.is_grad_enabled():
                return inner(*args, **kwargs)
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)


# -- ours --------------------------------------------------------------------------------------------------------------


def our_worker(pipe: Connection, work: Work) -> None:
    """The same for the platform's own trainer and services."""
    import torch

    from benchmarks.train import useful_gflop
    from steersman.config.algorithms import PpoSpec
    from steersman.config.manifest import Generation, Lora, Optimizer, RlStage
    from steersman.nn.hardware import use_fast_exact_matmul
    from steersman.nn.load import load_tokenizer
    from steersman.nn.tokens import tokenizer_fingerprint
    from training.online.checkpoint import Checkpoints
    from training.online.clients import PolicyReplica, ReferenceClient, RewardClient
    from training.online.loop import RlLoop
    from training.online.policy_model import PolicyModel
    from training.online.pool import PolicyPool
    from training.online.rollout import Prompt, Rollouts

    torch.set_num_threads(work.threads)
    use_fast_exact_matmul()
    tokenizer = load_tokenizer(work.folder)
    fingerprint = tokenizer_fingerprint(tokenizer)
    ppo = PpoSpec() if work.reward_model else None
    spec = RlStage(
        algorithm="ppo" if ppo else "rloo",
        ppo=ppo,
        lora=Lora(rank=RANK, alpha=ALPHA),
        optimizer=Optimizer(learning_rate=RATE, schedule="constant", warmup_ratio=0.0),
        steps=work.steps,
        prompts_per_step=work.prompts,
        samples_per_prompt=work.samples,
        generation=Generation(max_new_tokens=max(work.lengths)),
        kl_coefficient=KL,
        micro_batch_tokens=1 << 16,
    )
    prompts = [
        Prompt(
            np.asarray(tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False), np.int32), one
        )
        for one in work.messages()
    ]
    scorer: dict[str, Any] = {"name": "regex", "kind": "verifiable", "options": {"pattern": PATTERN}}
    if work.reward_model:
        scorer = {"name": "reward", "kind": "model", "path": str(work.reward_model)}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def start(kind: str, **settings: Any) -> common.Process:
            return stack.enter_context(common.service(kind, work.threads, precision=work.precision, **settings))

        policy = start("policy", model=str(work.folder))
        reference, reward = start("reference", model=str(work.folder)), start("reward", scorers=[scorer])
        replica = PolicyReplica(policy.target, policy.weights_target, 60.0, print)
        pool = PolicyPool([replica], fingerprint)
        clients = (
            [RewardClient(reward.target, fingerprint, 60.0, print)],
            [ReferenceClient(reference.target, fingerprint, 60.0, print)],
        )
        forced: Any = ForcedPool(replica, work.lengths)
        decode = lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))  # noqa: E731
        model = PolicyModel(
            work.folder,
            spec.lora,
            ppo.critic if ppo else None,
            work.reward_model,
            device="cpu",
            precision=work.precision,
            temperature=1.0,
            seed=0,
        )
        rollouts = Rollouts(forced, *clients, decode, spec.generation, (), lambda _: None)
        trainer = RlLoop(
            spec, model, rollouts, pool, prompts, Checkpoints(Path(folder)), _Silent(), seed=0
        )  # fmt: skip
        trainer.publish(0)
        answers = sum(work.lengths)
        tokens = sum(len(one.ids) for one in prompts) + answers
        # Of RLOO, which has no critic.
        useful = (
            {} if ppo else {"useful_gflop": useful_gflop(model.policy.get_base_model(), tokens, answers, lora=True)}
        )
        for step in range(work.steps):
            pipe.recv()
            begun = time.perf_counter()
            experience = trainer.collector.collect(step)
            collected = time.perf_counter()
            trainer.update(experience.batch, step)
            updated = time.perf_counter()
            trainer.publish(step + 1)
            end = time.perf_counter()
            generating = experience.metrics["seconds_generate"]
            services = sum(common.peak_gib(one.pid) for one in (policy, reference, reward))
            pipe.send(
                {
                    "generate": generating,
                    "scoring after generation": collected - begun - generating,
                    "update": updated - collected,
                    "publish": end - updated,
                    "seconds": end - begun,
                    **useful,
                    "peak_gib": common.peak_gib(),
                    "services_gib": services,
                }
            )
        pool.close()


class ForcedPool:
    """`PolicyPool.generate` with a length for every sample."""

    def __init__(self, replica: Any, lengths: Sequence[int]) -> None:
        self._replica = replica
        self._lengths = lengths

    async def samples(self, prompts: Sequence[np.ndarray], n: int, sampling: Any, **options: Any) -> AsyncIterator[Any]:
        """Samples, the short ones first; the engine shares a prompt's prefix among its samples in any case."""
        from dataclasses import replace

        from steersman.rpc.wire import pack_rows
        from steersman.v1 import common_pb2, policy_pb2

        if len(set(self._lengths)) == 1:
            parts = [(list(range(len(prompts))), 0, n, self._lengths[0])]
        else:
            parts = sorted(
                (([row // n], row % n, 1, length) for row, length in enumerate(self._lengths)), key=lambda one: one[3]
            )
        calls = []
        for indices, sample, count, length in parts:
            options = common_pb2.SamplingParams(
                max_new_tokens=length, min_new_tokens=length, seed=sampling.seed * 1000 + indices[0] * n + sample
            )
            request = policy_pb2.GenerateRequest(
                prompts=pack_rows([prompts[i] for i in indices]), n=count, sampling=options
            )
            calls.append((indices, sample, self._replica.generate(request)))

        async def made(indices: list[int], first: int, call: Any) -> list[Any]:
            return [
                replace(one, prompt_index=indices[one.prompt_index], sample_index=first + one.sample_index, ended=True)
                async for one in call
            ]

        for part in asyncio.as_completed([made(*call) for call in calls]):
            for one in await part:
                yield one


class _Silent:
    def activity(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, *args: object, **metrics: object) -> None: ...


# -- turns -------------------------------------------------------------------------------------------------------------


def _child(worker: Callable[[Connection, Work], None], pipe: Connection, work: Work) -> None:
    die_with_parent()  # TRL's process holds up to 15 GB
    worker(pipe, work)


def compare(
    name: str, work: Work, rounds: int, peer: Callable[[Connection, Work], None] = trl_worker
) -> dict[str, Any]:
    """Starts both, lets them take turns."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for label, worker in (("trl", peer), ("ours", our_worker)):
        pipes[label], theirs = context.Pipe()
        processes.append(context.Process(target=_child, args=(worker, theirs, work), name=label))
        processes[-1].start()
        theirs.close()
    found: dict[str, list[dict[str, float]]] = {label: [] for label in pipes}

    def turn(label: str) -> Callable[[], float]:
        def run() -> float:
            pipes[label].send("go")
            found[label].append(pipes[label].recv())
            return found[label][-1]["seconds"]

        return run

    try:
        seconds = common.alternate({label: turn(label) for label in pipes}, rounds, say=name)
    finally:
        for process in processes:
            process.join(60)
            process.terminate()
    phases = {
        label: {phase: statistics.median(one[phase] for one in rows[1:]) for phase in rows[-1]}
        for label, rows in found.items()
    }
    ours = phases["ours"]
    return {
        "answers": len(work.lengths),
        "answer_tokens": sum(work.lengths),
        "longest": max(work.lengths),
        "seconds": seconds,
        "ratio": common.ratio(seconds["trl"], seconds["ours"]),
        "memory_ratio": ours["peak_gib"] / phases["trl"]["peak_gib"],
        "memory_ratio_with_services": (ours["peak_gib"] + ours["services_gib"]) / phases["trl"]["peak_gib"],
        "phases": phases,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Prints what `compare` found."""
    print(f"\n{name}: {result['answers']} answers, {result['answer_tokens']} tokens, longest {result['longest']}")
    rows = [
        [label, phase, value]
        for label, phases in result["phases"].items()
        for phase, value in phases.items()
        if phase != "useful_gflop"
    ]
    table(("", "phase", "median"), rows)
    print(
        f"ratio {result['ratio']:.2f}, memory {result['memory_ratio']:.2f} "
        f"(with services {result['memory_ratio_with_services']:.2f})"
    )


def main() -> None:

    parser = command_line(__doc__, "rl", rounds=5, model=True)
    parser.add_argument("--works", nargs="+", default=["equal", "natural"], choices=["equal", "natural"])
    parser.add_argument("--prompts", type=int, default=3, help=f"prompts an update, {SAMPLES} answers each")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer, or of the longest natural one x 0.5")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder = base_model(arguments)
    limits, precision = common.ceilings(), pick_precision(arguments.precision)
    count = arguments.prompts * SAMPLES
    lengths = {"equal": [arguments.new] * count, "natural": common.natural_lengths(count, 2 * arguments.new)}
    report: dict[str, Any] = {**heading(arguments.threads), "precision": precision, "ceilings": limits, "works": {}}
    for name in arguments.works:
        work = Work(
            folder, arguments.prompts, lengths[name], arguments.threads, arguments.rounds + 1, precision=precision
        )
        result = compare(name, work, arguments.rounds)
        ours = result["phases"]["ours"]
        result["gemm_share"] = ours["useful_gflop"] / ours["update"] / limits[f"gemm_{precision}_gflops"]
        report["works"][name] = result
        report[f"ratio_{name}"] = result["ratio"]
    first = report["works"][arguments.works[0]]
    for key in ("memory_ratio", "memory_ratio_with_services", "gemm_share"):
        report[key] = first[key]
    for name, result in report["works"].items():
        show(name, result)
        print(f"GEMM share {result['gemm_share']:.2f}")
    print("ceilings", limits)
    write(report, arguments.out)


if __name__ == "__main__":
    main()
