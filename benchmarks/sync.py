"""Weight sync: from the trainer's weights to a policy service that samples with them.

    python -m benchmarks.sync [--model FOLDER] [--rounds 5] [--replicas 1 2] [--through folder grpc]

The trainer's model runs in this process, each policy service in one of its own. Weights go over gRPC, as between
machines, or through a folder in memory, as on one machine. `pause` is what generation stands still. After the last
round answers are sampled and their log-probabilities compared with the trainer's. Prints a table and writes
build/bench/sync.json.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.report import base_model, command_line, heading, table, write
from steersman.config.manifest import Lora
from steersman.local.memory import memory_folder
from steersman.nn.load import load_tokenizer
from steersman.nn.packed import pack
from steersman.nn.tokens import tokenizer_fingerprint
from steersman.v1 import common_pb2
from training.online.clients import PolicyReplica
from training.online.policy_model import PolicyModel
from training.online.pool import PolicyPool
from training.online.publication import Outbox

TARGETS = {"lora": 0.1, "full": 0.5}
LARGE_BYTES = 8.03e9 * 2
"""8B parameters in bfloat16."""


class _Replica(PolicyReplica):
    """Remembers how long the last publication stopped generation."""

    pause_seconds = 0.0

    size = 0

    async def load(self, version: int, outbox: Outbox) -> float:
        self.pause_seconds = await super().load(version, outbox)
        self.size = outbox.manifest.size
        return self.pause_seconds


def change(model: PolicyModel, generator: torch.Generator) -> None:
    """As an optimizer step would: every trained weight gets another value."""
    with torch.no_grad():
        for parameter in model.policy_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.add_(noise, alpha=1e-4)


def mismatch(model: PolicyModel, pool: PolicyPool, prompts: Sequence[np.ndarray]) -> float:
    """Mean absolute difference of the log-probabilities of sampled tokens, engine against trainer."""
    sampling = common_pb2.SamplingParams(max_new_tokens=16, min_new_tokens=16, seed=1)
    samples = list(pool.generate(prompts, 1, sampling))
    packed = pack([(prompts[one.prompt_index], [one.token_ids]) for one in samples], model.device)
    with torch.no_grad():
        own = model.logprobs(packed).cpu().numpy()
    return float(np.abs(own - np.concatenate([one.logprobs for one in samples])).mean())


def measure(
    folder: Path,
    kind: str,
    ways: Sequence[str],
    replicas: int,
    rounds: int,
    threads: int,
    precision: str,
    device: str = "cpu",
) -> list[dict[str, object]]:
    """One report for each way that weights take to the same services."""
    lora = Lora() if kind == "lora" else None
    trained = "fp32" if device == "cpu" else precision
    model = PolicyModel(folder, lora, None, None, device=device, precision=trained, temperature=1.0, seed=0)
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(memory_folder(sum(p.numel() * 4 for p in model.parameters())))
        assert shared is not None, "memory has no room for a publication"
        options = {
            "model": str(folder),
            "precision": precision,
            "device": device,
            "artifactUrls": [f"file://{shared}/"],
        }
        services = [stack.enter_context(common.service("policy", threads, **options)) for _ in range(replicas)]
        return [_publish(model, folder, kind, through, services, rounds, shared) for through in ways]


def _publish(
    model: PolicyModel,
    folder: Path,
    kind: str,
    through: str,
    services: Sequence[common.Process],
    rounds: int,
    shared: Path,
) -> dict[str, object]:
    generator = torch.Generator(model.device).manual_seed(0)
    clients = [_Replica(one.target, one.weights_target, 60.0, print) for one in services]
    pool = PolicyPool(clients, tokenizer_fingerprint(load_tokenizer(folder)), shared if through != "grpc" else None)
    if through == "folder":
        pool.leave_device()
    times, pauses = [], []
    with contextlib.closing(pool):
        served = pool.info().model.dtype
        dtype = torch.bfloat16 if served == "bfloat16" else torch.float32
        for number in range(rounds + 1):
            change(model, generator)
            start = time.perf_counter()
            pool.publish(model.payload(dtype))
            seconds = time.perf_counter() - start
            print(f"{kind} through {through} x{len(services)}: {seconds:.3f} s", flush=True)
            if number:
                times.append(seconds)
                pauses.append(max(client.pause_seconds for client in clients))
        difference = mismatch(model, pool, common.chat_prompts(folder, 8))
    seconds = statistics.median(times)
    size = clients[0].size
    return {
        "kind": kind,
        "through": through,
        "replicas": len(services),
        "served_dtype": served,
        "megabytes": size / 1e6,
        "pause_seconds": statistics.median(pauses),
        "seconds": seconds,
        "target_seconds": TARGETS[kind],
        "logprob_mismatch": difference,
        "service_peak_gib": max(common.peak_gib(one.pid) for one in services),
        "large_model_seconds": LARGE_BYTES / (size / seconds) if kind == "full" else None,
    }


def main() -> None:
    parser = command_line(__doc__, "sync", rounds=5, model=True)
    parser.add_argument("--kinds", nargs="+", default=["lora", "full"], choices=list(TARGETS))
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--through", nargs="+", default=["folder", "grpc"], choices=["folder", "grpc"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of the policy service")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = base_model(arguments)
    limits = common.ceilings()
    results = [
        one
        for kind in arguments.kinds
        for replicas in arguments.replicas
        for one in measure(
            folder, kind, arguments.through, replicas, arguments.rounds, arguments.threads, arguments.precision
        )
    ]
    names = ("kind", "through", "replicas", "megabytes", "pause_seconds", "seconds", "target_seconds")
    header = ("weights", "through", "replicas", "MB", "pause s", "usable after s", "target s", "mismatch", "8B bf16 s")
    table(header, [[one[n] for n in (*names, "logprob_mismatch", "large_model_seconds")] for one in results])
    print("ceilings", limits)
    write({**heading(arguments.threads), "ceilings": limits, "results": results}, arguments.out)


if __name__ == "__main__":
    main()
