"""The update: tokens per second, share of the machine's matrix-product rate, peak memory; and how cost grows.

    python -m benchmarks.train [--model FOLDER] [--rounds 3] [--variants ...] [--no-scaling]

Work: 12 prompts of about 60 tokens with 4 answers each of natural lengths (median 24, at most 96 tokens); a forward
pass, the policy loss and a backward pass, and the optimizer's step. `padded` is the usual way with transformers: one
row a sample, padded, logits of all positions. The others are the trainer's own model. Each variant runs in a process of
its own, so that its peak memory is its own. Then the stages that TRL trains, before and after packing
(`benchmarks/train_stages.py`). Prints tables and writes build/bench/train.json.

`useful` are the products that the mathematics needs: 2 x parameters x tokens forward, as much again for the gradient of
the activations and, where weights are trained, of the weights; the head only for answer tokens; no recomputation.
Shared prompts count once in `tokens`; `answer tokens/s` compares all variants.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import common, train_stages
from benchmarks.processes import in_own_process
from benchmarks.report import base_model, command_line, heading, table, write
from steersman.config.algorithms import Critic
from steersman.config.manifest import Lora
from steersman.heap import keep_freed_memory
from steersman.nn.packed import pack
from training.mathematics import losses
from training.online.policy_model import PolicyModel

SHAPES = {
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
}  # fmt: skip
"""SmolLM2-360M and Llama 3.2 1B with the default model's vocabulary; random weights."""
VARIANTS = ("padded fp32", "full fp32", "lora fp32", "lora fp32 ppo", "lora fp32 checkpointed", "lora bf16")


@dataclass(frozen=True)
class Work:
    prompts: int = 12
    samples: int = 4
    prompt_tokens: int = 60
    longest: int = 96

    def groups(self, vocab: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        generator = np.random.default_rng(0)
        lengths = iter(common.natural_lengths(self.prompts * self.samples, self.longest))

        def tokens(count: int) -> np.ndarray:
            return generator.integers(3, vocab, count).astype(np.int32)

        return [
            (tokens(self.prompt_tokens), [tokens(next(lengths)) for _ in range(self.samples)])
            for _ in range(self.prompts)
        ]


@dataclass(frozen=True)
class Measured:
    seconds: float
    optimizer_seconds: float
    tokens: int
    """Of the forward pass, padding not counted."""
    answer_tokens: int
    useful_gflop: float
    peak_gib: float


def useful_gflop(model: torch.nn.Module, tokens: int, answer_tokens: int, lora: bool) -> float:
    """See the module's docstring; attention is left out (below a tenth at these lengths)."""
    trunk = trained = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            trunk += module.weight.numel()
            trained += module.weight.numel() if module.weight.requires_grad else 0
    config = model.config
    head = config.vocab_size * config.hidden_size
    per_head = 4 if lora else 6  # tied to the embedding, which full fine-tuning trains
    return (tokens * (4 * trunk + 2 * trained) + answer_tokens * per_head * head) / 1e9


def run_variant(variant: str, folder: Path, work: Work, rounds: int) -> Measured:
    """In this process: best set-up of one variant, median of the rounds after one warm-up."""
    keep_freed_memory()
    words = variant.split()
    precision = words[1]
    lora = Lora() if words[0] == "lora" else None
    if words[0] == "padded":
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        groups = work.groups(module.config.vocab_size)
        forward = _padded(module, groups)
        parameters = list(module.parameters())
    else:
        critic = Critic(kind="valueHead") if "ppo" in words else None
        model = PolicyModel(
            folder, lora, critic, None, device="cpu", precision=precision, temperature=1.0, seed=0,
            gradient_checkpointing="checkpointed" in words,
        )  # fmt: skip
        model.train()
        module = model.policy.get_base_model() if lora else model.policy
        groups = work.groups(module.config.vocab_size)
        forward = _packed(model, groups)
        parameters = [one for one in model.parameters() if one.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-5, eps=1e-5, fused=True)
    tokens, answers = _sizes(groups, repeated=words[0] == "padded")
    both: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        forward().backward()
        middle = time.perf_counter()
        adam.step()
        adam.zero_grad(set_to_none=True)
        both.append((middle - start, time.perf_counter() - middle))
    return Measured(
        seconds=statistics.median(one for one, _ in both[1:]),
        optimizer_seconds=statistics.median(one for _, one in both[1:]),
        tokens=tokens,
        answer_tokens=answers,
        useful_gflop=useful_gflop(module, tokens, answers, lora is not None),
        peak_gib=common.peak_gib(),
    )


def _sizes(groups: list[tuple[np.ndarray, list[np.ndarray]]], repeated: bool) -> tuple[int, int]:
    answers = sum(len(answer) for _, members in groups for answer in members)
    prompts = sum(len(prompt) * (len(members) if repeated else 1) for prompt, members in groups)
    return prompts + answers, answers


def _advantages(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def _packed(model: PolicyModel, groups: list[tuple[np.ndarray, list[np.ndarray]]]) -> Callable[[], torch.Tensor]:
    batch = pack(groups)
    advantages = _advantages(len(batch.targets))

    def run() -> torch.Tensor:
        forward = model(batch)
        loss, _ = losses.ppo_policy_loss(
            forward.logprobs, forward.logprobs.detach(), advantages, denominator=len(advantages), clip_low=0.2
        )
        return loss if forward.values is None else loss + (forward.values - advantages).square().mean()

    return run


def _padded(module: torch.nn.Module, groups: list[tuple[np.ndarray, list[np.ndarray]]]) -> Callable[[], torch.Tensor]:
    rows = [(prompt, answer) for prompt, members in groups for answer in members]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.from_numpy(np.concatenate([prompt, answer]))
        mask[row, :length] = 1
        answers[row, len(prompt) : length] = True
    advantages = _advantages(int(answers.sum()))

    def run() -> torch.Tensor:
        logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0][answers[:, 1:]]
        loss, _ = losses.ppo_policy_loss(
            logprobs, logprobs.detach(), advantages, denominator=len(advantages), clip_low=0.2
        )
        return loss

    return run


def random_model(name: str, like: Path, folder: Path) -> Path:
    """A checkpoint of another size with random weights and the default model's vocabulary."""
    config = LlamaConfig.from_pretrained(like)
    for key, value in (SHAPES[name] | {"head_dim": None}).items():
        setattr(config, key, value)
    config.head_dim = config.hidden_size // config.num_attention_heads
    with torch.device("cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def measure(variant: str, folder: Path, work: Work, rounds: int, threads: int) -> dict[str, float]:
    """`run_variant` in a process of its own."""
    request = {"variant": variant, "folder": str(folder), "work": asdict(work), "rounds": rounds}
    found: dict[str, float] = in_own_process("benchmarks.train", request, threads)
    found["tokens_per_second"] = found["tokens"] / found["seconds"]
    found["answer_tokens_per_second"] = found["answer_tokens"] / found["seconds"]
    found["gflops"] = found["useful_gflop"] / found["seconds"]
    print(f"{variant}: {found['seconds']:.2f} s, {found['peak_gib']:.2f} GiB", flush=True)
    return found


def scaling(folder: Path, rounds: int, threads: int, scratch: Path) -> list[dict[str, object]]:
    """One update of `lora fp32` for other batches, lengths and models."""
    cases: list[tuple[str, Path, Work]] = [
        ("3 prompts", folder, Work(prompts=3)),
        ("12 prompts", folder, Work()),
        ("24 prompts", folder, Work(prompts=24)),
        ("answers up to 24", folder, Work(longest=24)),
        ("answers up to 384", folder, Work(prompts=3, longest=384)),
        ("prompts of 480", folder, Work(prompts=3, prompt_tokens=480)),
    ]
    cases += [(name, random_model(name, folder, scratch / name), Work(prompts=3)) for name in SHAPES]
    return [
        {"case": name, **asdict(work), **measure("lora fp32", place, work, max(1, rounds - 1), threads)}
        for name, place, work in cases
    ]


def main() -> None:
    parser = command_line(__doc__, "train", rounds=3, model=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--no-scaling", action="store_true")
    parser.add_argument("--no-stages", action="store_true", help="leave out SFT, reward model, DPO and KTO")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        request = json.loads(arguments.child)
        found = run_variant(request["variant"], Path(request["folder"]), Work(**request["work"]), request["rounds"])
        print(json.dumps(asdict(found)))
        return
    torch.set_num_threads(arguments.threads)
    folder = base_model(arguments)
    limits = common.ceilings()
    results = {name: measure(name, folder, Work(), arguments.rounds, arguments.threads) for name in arguments.variants}
    cases: list[dict[str, object]] = []
    if not arguments.no_scaling:
        with tempfile.TemporaryDirectory() as scratch:
            cases = scaling(folder, arguments.rounds, arguments.threads, Path(scratch))
    for name, found in [*results.items(), *(("lora fp32", case) for case in cases)]:
        found["gemm_share"] = found["gflops"] / limits[f"gemm_{name.split()[1]}_gflops"]  # type: ignore[operator]
    header = ("", "s", "optimizer s", "tokens/s", "answer tokens/s", "GFLOP/s", "share of GEMM", "peak GiB")
    columns = ("seconds", "optimizer_seconds", "tokens_per_second", "answer_tokens_per_second", "gflops",
               "gemm_share", "peak_gib")  # fmt: skip
    table(header, [[name, *(found[column] for column in columns)] for name, found in results.items()])
    if cases:
        print("\nlora fp32, one update:")
        table(("", "tokens", *header[1:]), [[c["case"], c["tokens"], *(c[k] for k in columns)] for c in cases])
    stages = {} if arguments.no_stages else train_stages.measure(folder, arguments.rounds, arguments.threads)
    if stages:
        print("\nstages, one micro-batch:")
        train_stages.show(stages)
    print("ceilings", limits)
    report = {**heading(arguments.threads), "ceilings": limits, "variants": results, "scaling": cases, "stages": stages}
    write(report, arguments.out)


if __name__ == "__main__":
    main()
