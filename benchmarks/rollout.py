"""Rollout speed of the policy service against `model.generate`, in one run.

    python -m benchmarks.rollout [--model FOLDER] [--precision auto fp32 bf16] [--rounds 3] [--threads 2]

Workload: 64 chat prompts of about 60 tokens that share the chat template's system turn; 64 new tokens each ('equal'),
16 to 192 ('varied'), or one request. Stop tokens are suppressed, sampled-token log-probabilities kept. The service
runs as a process of its own and is called over gRPC; it and the peer take turns, so that both see the same machine.
The peer is transformers' `generate` in bfloat16 on static batches. Prints a table and writes build/bench/rollout.json.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from benchmarks import common
from benchmarks.report import base_model, command_line, heading, write
from steersman.rpc.client import open_channel
from steersman.rpc.wire import pack_rows, unpack_rows
from steersman.v1 import common_pb2, policy_pb2, policy_pb2_grpc


@dataclass(frozen=True)
class Workload:
    name: str
    prompts: list[np.ndarray]
    """int32 [P] each"""
    lengths: list[int]
    """New tokens, one number a prompt."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def workloads(folder: Path) -> list[Workload]:
    prompts = common.chat_prompts(folder, 64)
    varied = np.random.default_rng(0).integers(16, 193, 64).tolist()
    return [
        Workload("1 request", prompts[:1], [64]),
        Workload("64 equal", prompts, [64] * 64),
        Workload("64 varied", prompts, varied),
    ]


class Logprobs(LogitsProcessor):
    """Keeps the log-probability of every sampled token, step by step, as a rollout needs it."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []
        self._before: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._before is not None:
            self.rows.append(self._before.gather(1, input_ids[:, -1:]))
        self._before = scores.float().log_softmax(-1)
        return scores


@torch.inference_mode()
def generate(model: PreTrainedModel, work: Workload) -> None:
    """The peer: one static batch, padded left, as long as its longest answer."""
    longest = max(len(prompt) for prompt in work.prompts)
    ids = torch.zeros((len(work.prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(work.prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        max_new_tokens=max(work.lengths),
        min_new_tokens=max(work.lengths),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        logits_processor=LogitsProcessorList([Logprobs()]),
    )


def rollout(stub: policy_pb2_grpc.PolicyServiceStub, work: Workload) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ours: one call for each length. (prompt, token ids, log-probabilities) of every sample."""
    calls = []
    for length in sorted(set(work.lengths), reverse=True):
        chosen = [prompt for prompt, one in zip(work.prompts, work.lengths, strict=True) if one == length]
        sampling = common_pb2.SamplingParams(max_new_tokens=length, min_new_tokens=length, seed=1)
        request = policy_pb2.GenerateRequest(prompts=pack_rows(chosen), sampling=sampling)
        calls.append((chosen, stub.Generate(request)))
    return [
        (
            chosen[response.prompt_index],
            unpack_rows(response.token_ids, np.int32, "token_ids")[0],
            unpack_rows(response.logprobs, np.float32, "logprobs")[0],
        )
        for chosen, call in calls
        for response in call
    ]


@torch.inference_mode()
def mismatch(model: PreTrainedModel, samples: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Absolute difference of log-probabilities to transformers' float32 forward, over the samples' tokens."""
    differences = []
    for prompt, token_ids, logprobs in samples:
        ids = torch.from_numpy(np.concatenate([prompt, token_ids])).long()
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
        differences.append(np.abs(expected.numpy() - logprobs))
    values = np.concatenate(differences)
    return {"mean": float(values.mean()), "max": float(values.max()), "tokens": len(values)}


def run(folder: Path, precisions: list[str], rounds: int, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    works = workloads(folder)
    seconds: dict[str, dict[str, list[float]]] = {}
    samples: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    engines: dict[str, dict[str, object]] = {}
    with contextlib.ExitStack() as stack:
        settings = {"model": str(folder), "kvCacheTokens": 64 * 320}
        services = {
            name: stack.enter_context(common.service("policy", threads, shared=False, precision=name, **settings))
            for name in precisions
        }
        channels = {name: stack.enter_context(open_channel(one.target)) for name, one in services.items()}
        stubs = {name: policy_pb2_grpc.PolicyServiceStub(channel) for name, channel in channels.items()}
        for name, stub in stubs.items():
            info = stub.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest())
            engines[name] = {"dtype": info.model.dtype, "device": info.model.device}
            rollout(stub, Workload("warm-up", works[1].prompts[:8], [4] * 8))
        for round_number in range(rounds):
            for work in works:
                contenders: dict[str, Callable[[], object]] = {"generate bf16": functools.partial(generate, peer, work)}
                for name, stub in stubs.items():
                    contenders[name] = functools.partial(rollout, stub, work)
                for name, action in contenders.items():
                    start = time.perf_counter()
                    result = action()
                    elapsed = time.perf_counter() - start
                    seconds.setdefault(work.name, {}).setdefault(name, []).append(elapsed)
                    print(f"round {round_number + 1}  {work.name:10} {name:14} {elapsed:7.2f} s", flush=True)
                    if isinstance(result, list) and work.name == "64 equal":
                        samples[name] = result
        for name, one in services.items():
            engines[name]["peak_gib"] = common.peak_gib(one.pid)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, found in samples.items():
        engines[name]["logprob_mismatch"] = mismatch(exact, found[:16])
    return {
        **heading(threads),
        "ceilings": common.ceilings(),
        "engines": engines,
        "workloads": {work.name: _summary(work, seconds[work.name]) for work in works},
    }


def _summary(work: Workload, seconds: dict[str, list[float]]) -> dict[str, object]:
    """Median rates, and the median over the rounds of the ratio to the peer of the same round."""
    peer = seconds["generate bf16"]
    return {
        "tokens": work.tokens,
        "seconds": seconds,
        "tokens_per_second": {name: work.tokens / statistics.median(times) for name, times in seconds.items()},
        "ratio": {name: common.ratio(peer, times) for name, times in seconds.items()},
    }


def print_table(report: dict[str, object]) -> None:
    print(f"\n{'tokens/s (ratio to generate)':30}", *(f"{name:>18}" for name in report["workloads"]))  # type: ignore[attr-defined]
    rows = next(iter(report["workloads"].values()))["ratio"]  # type: ignore[attr-defined]
    for name in rows:
        cells = [
            f"{work['tokens_per_second'][name]:9.0f} ({work['ratio'][name]:5.2f})"
            for work in report["workloads"].values()  # type: ignore[attr-defined]
        ]
        print(f"{name:30}", *(f"{cell:>18}" for cell in cells))
    for name, engine in report["engines"].items():  # type: ignore[attr-defined]
        print(name, json.dumps(engine))
    print("ceilings", json.dumps(report["ceilings"]))


def main() -> None:
    parser = command_line(__doc__, "rollout", rounds=3, model=True)
    parser.add_argument("--precision", nargs="+", default=["auto"], choices=["auto", "fp32", "bf16"])
    arguments = parser.parse_args()
    folder = base_model(arguments)
    report = run(folder, arguments.precision, arguments.rounds, arguments.threads)
    print_table(report)
    write(report, arguments.out)


if __name__ == "__main__":
    main()
