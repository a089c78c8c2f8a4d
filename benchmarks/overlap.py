"""Generation and training at the same time: the step's seconds with `max_staleness` 0 and 1.

    python -m benchmarks.overlap [--model FOLDER] [--steps 8]

Two policy services: `simulated` has an engine that only takes time, as one on other hardware would, as long for a batch
as the trainer for an update; `pinned` is the real one, on one core, the trainer on another. Scoring is immediate.
The trainer's loop, its forward and backward passes, the weights transaction and the streams are the real ones, on one
thread. With staleness 0 a step takes generation plus update, with 1 the larger of the two. Prints a table and writes
build/bench/overlap.json.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch

from benchmarks import common
from benchmarks.report import base_model, command_line, heading, table, write
from benchmarks.services import null_services
from steersman.config.manifest import Generation, RlStage
from steersman.testing.fake_engine import FakeEngine
from training.online import loop
from training.online.checkpoint import Checkpoints
from training.online.clients import PolicyReplica, ReferenceClient, RewardClient
from training.online.loop import RlLoop
from training.online.policy_model import PolicyModel
from training.online.pool import PolicyPool
from training.online.rollout import Prompt, Rollouts

PROMPTS, SAMPLES, NEW = 4, 4, 32


def serve_engine(pipe: Connection, seconds_per_token: float) -> None:
    """A policy service whose engine takes time and nothing else."""
    from services.policy.chat import ChatFormat
    from services.policy.config import PolicyConfig
    from services.policy.servicer import PolicyServicer
    from services.policy.weights import WeightsServicer
    from steersman.rpc.server import Server
    from steersman.v1 import policy_pb2_grpc, weights_pb2_grpc

    async def serve() -> None:
        engine = FakeEngine(eos_probability=0.0, seconds_per_step=seconds_per_token)
        engine.start()
        config = PolicyConfig(model="none", port=0, weights_port=0)
        data = (
            policy_pb2_grpc.add_PolicyServiceServicer_to_server,
            PolicyServicer(engine, ChatFormat(None, "")),
            common.READY["policy"],
        )
        control = (
            weights_pb2_grpc.add_WeightsServiceServicer_to_server,
            WeightsServicer(engine, config),
            "steersman.v1.WeightsService",
        )
        server = Server(config, [(0, [data]), (0, [control])])
        await server.start()
        await server.ready()
        pipe.send([f"127.0.0.1:{port}" for port in server.ports])
        await asyncio.Event().wait()

    asyncio.run(serve())


@contextmanager
def simulated(seconds_per_token: float) -> Iterator[tuple[str, str]]:
    """Addresses of the data plane and the control plane."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_engine, args=(theirs, seconds_per_token))
    process.start()
    try:
        yield tuple(ours.recv())
    finally:
        process.terminate()
        process.join(30)


@contextmanager
def pinned(folder: Path) -> Iterator[tuple[str, str]]:
    """The same of the real service, on the last core; this process keeps to the first."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    try:
        with common.service("policy", 1, model=str(folder), precision="fp32") as process:
            # The service's threads were started with this affinity; the trainer's may be older than the new one.
            for thread in psutil.Process().threads():
                os.sched_setaffinity(thread.id, {cores[0]})
            yield process.target, process.weights_target
    finally:
        for thread in psutil.Process().threads():
            os.sched_setaffinity(thread.id, cores)


class Record:
    """Takes the place of the run's reporter."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def activity(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...

    def step(self, step: int, steps: int, **metrics: float) -> None:
        self.steps.append(metrics)
        print(f"step {step}: {metrics['seconds']:.2f} s", flush=True)


def train(
    folder: Path, policy: AbstractContextManager[tuple[str, str]], staleness: int, steps: int
) -> dict[str, float]:
    """Median seconds of a step and of its parts; the first two steps fill the pipeline."""
    generator = np.random.default_rng(0)
    prompts = [Prompt(generator.integers(3, 256, 60).astype(np.int32), []) for _ in range(PROMPTS * 4)]
    spec = RlStage(
        algorithm="rloo",
        steps=steps,
        prompts_per_step=PROMPTS,
        samples_per_prompt=SAMPLES,
        generation=Generation(max_new_tokens=NEW),
        max_staleness=staleness,
        checkpoint_every=steps,
    )
    model = PolicyModel(folder, spec.lora, None, None, device="cpu", precision="fp32", temperature=1.0, seed=0)
    record = Record()
    with policy as (data, control), null_services() as null, tempfile.TemporaryDirectory() as out:
        pool = PolicyPool([PolicyReplica(data, control, 60.0, print)], "")
        scorers = [RewardClient(null, "", 60.0, print)], [ReferenceClient(null, "", 60.0, print)]
        rollouts = Rollouts(pool, *scorers, str, spec.generation, (), record.activity)
        trainer: Any = RlLoop(spec, model, rollouts, pool, prompts, Checkpoints(Path(out)), record, seed=0)
        trainer.run()
        pool.close()
    kept = record.steps[2:-1]  # the last step also writes the checkpoint
    return {
        "seconds": statistics.median(one["seconds"] for one in kept),
        "generation": statistics.median(one["seconds_generate"] + one["seconds_score_tail"] for one in kept),
        "update_and_publish": statistics.median(one["seconds_update"] + one["seconds_publish"] for one in kept),
    }


def main() -> None:
    parser = command_line(__doc__, "overlap", model=True)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = base_model(arguments)
    with mock.patch.object(loop, "check_same_model"):  # the simulated engine has no model
        alone = train(folder, simulated(0.0), 0, 5)
        seconds_per_token = alone["update_and_publish"] / NEW
        engines = {
            "simulated": [
                train(folder, simulated(seconds_per_token), staleness, arguments.steps) for staleness in (0, 1)
            ],
            "pinned": [train(folder, pinned(folder), staleness, arguments.steps) for staleness in (0, 1)],
        }
    table(
        ("engine, max_staleness", "step s", "generation s", "update and publish s"),
        [[f"{name}, {number}", *one.values()] for name, both in engines.items() for number, one in enumerate(both)],
    )
    over = {
        name: ahead["seconds"] / max(ahead["generation"], ahead["update_and_publish"]) - 1.0
        for name, (_, ahead) in engines.items()
    }
    for name, share in over.items():
        print(f"{name}: with staleness 1 a step takes {share:.1%} more than the larger of the two; target at most 5%")
    write({**heading(1), "staleness_0_and_1": engines, "over_the_larger": over, "target": 0.05}, arguments.out)


if __name__ == "__main__":
    main()
