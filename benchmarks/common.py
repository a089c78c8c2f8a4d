"""What the benchmarks share: prompts, services as processes, ceilings of the machine, turns."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from transformers import AutoTokenizer, LogitsProcessor

from benchmarks.processes import peak_mib
from steersman.errors import UnavailableError
from steersman.local.process import child_environment, free_ports
from steersman.rpc.client import open_channel, wait_ready

READY = {
    "policy": "steersman.v1.PolicyService",
    "reward": "steersman.v1.RewardService",
    "reference": "steersman.v1.ReferenceService",
}
_QUESTIONS = (
    "When will order {} be delivered? The shop promised it for last week and I need it for a birthday.",
    "I did not receive the invoice of order {}. Could you send it again to my company's address?",
    "One article of order {} arrived with a broken lid. What do I have to do to return it?",
    "Is article {} in stock again? I would like to buy four of them, if possible in the same colour.",
)


def chat_prompts(folder: Path, count: int) -> list[np.ndarray]:
    """int32 [P] each: customers' questions of about 60 tokens, which share the chat template's system turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        np.asarray(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": _QUESTIONS[i % len(_QUESTIONS)].format(1000 + 37 * i)}],
                add_generation_prompt=True,
                return_dict=False,
            ),
            np.int32,
        )
        for i in range(count)
    ]


def natural_lengths(count: int, longest: int) -> list[int]:
    """Lengths of answers as a chat model ends them: log-normal, median a quarter of the longest, cut there."""
    drawn = np.random.default_rng(0).lognormal(np.log(longest / 4), 0.7, count)
    return np.clip(np.round(drawn), 4, longest).astype(int).tolist()  # type: ignore[no-any-return]


class ForcedLengths(LogitsProcessor):
    """Gives every row of a static `generate` batch its length: no end before it, the end at it."""

    def __init__(self, lengths: Sequence[int], eos: int) -> None:
        self._lengths = torch.tensor(lengths)
        self._eos = eos
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._prompt is None:
            self._prompt = input_ids.shape[1]
        done = input_ids.shape[1] - self._prompt + 1  # tokens after this step
        scores[:, self._eos] = -torch.inf
        ends = self._lengths <= done
        if done < int(self._lengths.max()):  # the longest rows end by the token limit
            scores[ends] = -torch.inf
            scores[ends, self._eos] = 0.0
        return scores


# -- services ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A running service."""

    target: str
    weights_target: str
    pid: int


@contextlib.contextmanager
def service(kind: str, threads: int, *, shared: bool = True, **settings: Any) -> Iterator[Process]:
    """`python -m services.<kind>` in a process of its own on free ports, ready to serve.

    Args:
        shared: other processes compute on the same cores at the same time, see `child_environment`.
    """
    port, weights_port = free_ports(2)
    config: dict[str, Any] = {"port": port, "threads": threads} | settings
    if kind == "policy":
        config["weightsPort"] = weights_port
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{kind}.yaml"
        path.write_text(json.dumps(config))
        child = ["-m", "steersman.local.child", str(os.getpid())]  # it must not outlive the benchmark
        command = [sys.executable, *child, f"services.{kind}", "--config", str(path)]
        process = subprocess.Popen(command, env=child_environment(threads, offline=True, shared=shared))
        try:
            target = f"127.0.0.1:{port}"
            with open_channel(target) as channel:
                _wait(channel, kind, process)
            yield Process(target, f"127.0.0.1:{weights_port}", process.pid)
        finally:
            process.terminate()
            process.wait(30)


def _wait(channel: grpc.Channel, kind: str, process: subprocess.Popen[bytes]) -> None:
    """Until the service serves; UnavailableError where it has ended or does not."""
    for left in reversed(range(60)):
        try:
            return wait_ready(channel, READY[kind], timeout=5)
        except UnavailableError:
            if not left or process.poll() is not None:
                raise


def peak_gib(pid: int | str = "self") -> float:
    """Most memory that the process ever had, in GiB."""
    return peak_mib(pid) / 1024


def reset_peak() -> None:
    """The peak of this process starts anew, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# -- measuring ---------------------------------------------------------------------------------------------------------


def best_seconds(action: Callable[[], object], runs: int = 8) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def ceilings() -> dict[str, float]:
    """What the machine gives now, the best of several: matrix products of 2048 rows in GFLOP/s, memory in GB/s."""
    found = {}
    for name, dtype in (("gemm_fp32_gflops", torch.float32), ("gemm_bf16_gflops", torch.bfloat16)):
        a = torch.ones(2048, 2048, dtype=dtype)
        found[name] = 2 * 2048**3 / best_seconds(functools.partial(torch.mm, a, a), 5) / 1e9
    large, target = torch.ones(1 << 26), torch.ones(1 << 26)
    found["memory_read_gb_s"] = large.nbytes / best_seconds(large.sum) / 1e9
    found["memory_copy_gb_s"] = 2 * large.nbytes / best_seconds(lambda: target.copy_(large)) / 1e9
    return found


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int, say: str = "") -> dict[str, list[float]]:
    """Seconds that each contender reports, taking turns so that all see the same machine; a warm-up is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-1, rounds):
        for name, run in contenders.items():
            value = run()
            label = f"round {number + 1}" if number >= 0 else "warm-up"
            print(f"{say:24} {label:8} {name:24} {value:8.3f} s", flush=True)
            if number >= 0:
                seconds[name].append(value)
    return seconds


def ratio(peer: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the rounds of the peer's seconds over ours."""
    return statistics.median(one / other for one, other in zip(peer, ours, strict=True))
