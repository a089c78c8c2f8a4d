"""What the services cost: gRPC against the same engine called in process; and replicas.

    python -m benchmarks.services [--model FOLDER] [--rounds 5]

Work: 12 prompts of about 60 tokens with 4 answers each of at most 48 tokens, as in a step of the demo: generation,
reference log-probabilities, scores of a reward model. The same engine class runs in this process and, over gRPC, in a
process of its own; the two take turns. Because both compute the same, their difference is the tax, but it is a small
difference of large numbers; so the tax is also measured alone, as the time of the same calls with an engine that
answers at once. `tax` is that time as a share of the update's seconds (generation, scoring, reference, and the
trainer's forward and backward pass). Prints tables and writes build/bench/services.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks import common
from benchmarks.report import base_model, command_line, heading, table, write
from steersman.config.manifest import Lora
from steersman.nn.load import load_tokenizer
from steersman.nn.packed import pack
from steersman.nn.reward import RewardSettings
from steersman.nn.tokens import tokenizer_fingerprint
from steersman.rpc.server import Server, ServerConfig
from steersman.rpc.wire import pack_rows
from steersman.v1 import (
    common_pb2,
    policy_pb2,
    policy_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)
from training.online.clients import PolicyReplica, ReferenceClient, RewardClient, Sample
from training.online.policy_model import PolicyModel
from training.online.pool import PolicyPool
from training.online.remote import calls

SAMPLES, NEW = 4, 48
Rows = list[tuple[np.ndarray, np.ndarray]]
"""(prompt, answer)"""


# -- in process --------------------------------------------------------------------------------------------------------


class InProcess:
    """The engines of the three services without their servers."""

    def __init__(self, folder: Path, reward: Path, threads: int) -> None:
        from services.policy.engines.transformers_engine import TransformersEngine
        from services.reference.config import ReferenceConfig
        from services.reference.engine import ReferenceEngine
        from services.reward.config import RewardConfig, ScorerConfig
        from services.reward.engine import RewardEngine

        self.policy = TransformersEngine(folder, threads=threads)
        self.policy.start()
        self.reference = ReferenceEngine(ReferenceConfig(model=str(folder), threads=threads))
        self.reference.load()
        scorer = ScorerConfig(name="preference", kind="model", path=reward)
        self.reward = RewardEngine(RewardConfig(scorers=[scorer], threads=threads))
        self.reward.load()

    def generate(self, prompts: Sequence[np.ndarray]) -> int:
        from services.policy.engine import GenerationRequest, SampleFinished, SamplingParams

        events: queue.Queue[Any] = queue.Queue()
        params = SamplingParams(max_new_tokens=NEW, min_new_tokens=NEW, seed=1)
        self.policy.submit(GenerationRequest("one", prompts, params, n=SAMPLES), events.put)
        found = [events.get() for _ in range(len(prompts) * SAMPLES)]
        assert all(isinstance(event, SampleFinished) for event in found)
        return len(found)

    def logprobs(self, rows: Rows) -> list[np.ndarray]:
        from services.reference.engine import Row

        return self.reference.logprobs([Row(prompt, answer, 1.0) for prompt, answer in rows])

    def score(self, rows: Rows, fingerprint: str) -> list[reward_pb2.ItemScore]:
        from services.reward.engine import Item

        return self.reward.score([Item([], np.concatenate(row).tolist(), fingerprint, {}) for row in rows])


# -- an engine that answers at once ------------------------------------------------------------------------------------


class _NullReference(reference_pb2_grpc.ReferenceServiceServicer):
    async def ComputeLogprobs(self, request: Any, context: Any) -> reference_pb2.ComputeLogprobsResponse:
        lengths = np.asarray(request.token_ids.lengths) - np.asarray(request.prompt_lengths)
        rows = [np.zeros(length, np.float32) for length in lengths]
        return reference_pb2.ComputeLogprobsResponse(logprobs=pack_rows(rows, np.float32))


class _NullReward(reward_pb2_grpc.RewardServiceServicer):
    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        return reward_pb2.ScoreResponse(scores=[reward_pb2.ItemScore(reward=0.0) for _ in request.items])


class _NullPolicy(policy_pb2_grpc.PolicyServiceServicer):
    """The samples of a scripted engine, which takes no time."""

    async def Generate(self, request: Any, context: Any) -> Any:
        row = np.arange(request.sampling.max_new_tokens, dtype=np.int32)
        for prompt in range(len(request.prompts.lengths)):
            for sample in range(request.n):
                yield policy_pb2.GenerateResponse(
                    prompt_index=prompt,
                    sample_index=sample,
                    token_ids=pack_rows([row], np.int32),
                    logprobs=pack_rows([row], np.float32),
                    finish_reason=common_pb2.FINISH_REASON_LENGTH,
                    weights_versions=[0],
                )

    async def GetPolicyInfo(self, request: Any, context: Any) -> policy_pb2.GetPolicyInfoResponse:
        return policy_pb2.GetPolicyInfoResponse()


@contextlib.contextmanager
def null_services() -> Iterator[str]:
    """The three contracts on one port, in a thread; the messages take the same way as to real services."""
    ready: queue.Queue[Any] = queue.Queue()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        stop = asyncio.Event()
        services = [
            (policy_pb2_grpc.add_PolicyServiceServicer_to_server, _NullPolicy(), common.READY["policy"]),
            (reference_pb2_grpc.add_ReferenceServiceServicer_to_server, _NullReference(), common.READY["reference"]),
            (reward_pb2_grpc.add_RewardServiceServicer_to_server, _NullReward(), common.READY["reward"]),
        ]
        server = Server(ServerConfig(drain_seconds=0), [(0, services)])
        await server.start()
        await server.ready()
        ready.put((server.ports[0], stop))
        await stop.wait()
        await server.drain()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    port, stop = ready.get(timeout=60)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


# -- over gRPC ---------------------------------------------------------------------------------------------------------


class OverGrpc:
    """The trainer's clients."""

    def __init__(
        self, policy: Sequence[tuple[str, str]], reward: Sequence[str], reference: Sequence[str], fingerprint: str
    ) -> None:
        replicas = [PolicyReplica(target, weights, 60.0, print) for target, weights in policy]
        self.policy = PolicyPool(replicas, fingerprint)
        self.reward = [RewardClient(target, fingerprint, 60.0, print) for target in reward]
        self.reference = [ReferenceClient(target, fingerprint, 60.0, print) for target in reference]

    def close(self) -> None:
        for client in (self.policy, *self.reward, *self.reference):
            client.close()  # type: ignore[attr-defined]

    def generate(self, prompts: Sequence[np.ndarray]) -> list[Sample]:
        sampling = common_pb2.SamplingParams(max_new_tokens=NEW, min_new_tokens=NEW, seed=1)
        return list(self.policy.generate(prompts, SAMPLES, sampling))

    def logprobs(self, rows: Rows) -> None:
        _spread(self.reference, rows, lambda client, part: calls().run(client.logprobs(part, 1.0)))

    def score(self, rows: Rows) -> None:
        items = [reward_pb2.ScoreItem(token_ids=pack_rows([np.concatenate(row)])) for row in rows]
        _spread(self.reward, items, lambda client, part: calls().run(client.score(part)))


def _spread(clients: Sequence[Any], items: Sequence[Any], call: Callable[[Any, Any], object]) -> None:
    """An equal part for every replica, at the same time."""
    bounds = np.linspace(0, len(items), len(clients) + 1).astype(int)
    parts = [items[low:high] for low, high in itertools.pairwise(bounds)]
    threads = [threading.Thread(target=call, args=pair) for pair in zip(clients, parts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- measuring ---------------------------------------------------------------------------------------------------------


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def make_reward_model(base: Path, folder: Path) -> Path:
    """The default model with an untrained head: speed does not depend on what it has learnt."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "reward.json").write_text(RewardSettings().model_dump_json(by_alias=True))
    return folder


def train_seconds(folder: Path, rows: Rows, rounds: int) -> float:
    """Forward and backward pass of the trainer on the same samples."""
    model = PolicyModel(folder, Lora(), None, None, device="cpu", precision="fp32", temperature=1.0, seed=0)
    groups = [(rows[i][0], [answer for _, answer in rows[i : i + SAMPLES]]) for i in range(0, len(rows), SAMPLES)]
    batch = pack(groups)
    times = [seconds_of(lambda: model(batch).logprobs.sum().backward()) for _ in range(rounds + 1)]
    return statistics.median(times[1:])


def compare(
    local: InProcess, remote: OverGrpc, null: OverGrpc, prompts: list[np.ndarray], rows: Rows, mark: str, rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds of every phase, by how the engine is called."""
    work: dict[str, dict[str, Callable[[], object]]] = {
        "generate": {
            "in process": lambda: local.generate(prompts),
            "gRPC": lambda: remote.generate(prompts),
            "gRPC, empty engine": lambda: null.generate(prompts),
        },
        "reference": {
            "in process": lambda: local.logprobs(rows),
            "gRPC": lambda: remote.logprobs(rows),
            "gRPC, empty engine": lambda: null.logprobs(rows),
        },
        "reward": {
            "in process": lambda: local.score(rows, mark),
            "gRPC": lambda: remote.score(rows),
            "gRPC, empty engine": lambda: null.score(rows),
        },
    }
    found = {}
    for phase, ways in work.items():
        contenders = {name: functools.partial(seconds_of, action) for name, action in ways.items()}
        seconds = common.alternate(contenders, rounds, say=phase)
        found[phase] = {name: statistics.median(values) for name, values in seconds.items()}
    return found


def run(folder: Path, reward: Path, rounds: int, threads: int) -> dict[str, Any]:
    prompts = common.chat_prompts(folder, 12)
    fingerprint = tokenizer_fingerprint(load_tokenizer(folder))
    generator = np.random.default_rng(0)
    rows = [(prompt, generator.integers(3, 256, NEW).astype(np.int32)) for prompt in prompts for _ in range(SAMPLES)]
    train = train_seconds(folder, rows, min(rounds, 3))
    scorer = {"name": "preference", "kind": "model", "path": str(reward)}
    with null_services() as target, _started(folder, scorer, fingerprint, [threads]) as remote:
        null = OverGrpc([(target, target)], [target], [target], fingerprint)
        local = InProcess(folder, reward, threads)
        phases = compare(local, remote, null, prompts, rows, fingerprint, rounds)
        null.close()
        local.policy.close()
    update = train + sum(phase["gRPC"] for phase in phases.values())
    return {
        "phases": phases,
        "train_seconds": train,
        "update_seconds": update,
        "tax": sum(phase["gRPC, empty engine"] for phase in phases.values()) / update,
        "difference": sum(phase["gRPC"] - phase["in process"] for phase in phases.values()) / update,
        "target": 0.03,
        "replicas": [replicated(folder, scorer, fingerprint, prompts, rows, count, threads) for count in (1, 2)],
    }


def replicated(
    folder: Path, scorer: dict[str, Any], mark: str, prompts: list[np.ndarray], rows: Rows, count: int, threads: int
) -> dict[str, float]:
    """Median seconds of the phases with `count` replicas of each service, which share the threads."""
    each = max(1, threads // count)
    with _started(folder, scorer, mark, [each] * count) as remote:
        actions: dict[str, Callable[[], object]] = {
            "generate": lambda: remote.generate(prompts),
            "reference": lambda: remote.logprobs(rows),
            "reward": lambda: remote.score(rows),
        }
        found = {name: statistics.median([seconds_of(run) for _ in range(4)][1:]) for name, run in actions.items()}
    return {"replicas": count, "threads_each": each, **found}


@contextlib.contextmanager
def _started(folder: Path, scorer: dict[str, Any], fingerprint: str, threads: Sequence[int]) -> Iterator[OverGrpc]:
    """A replica of each service for every number of threads."""
    with contextlib.ExitStack() as stack:

        def start(kind: str, **settings: Any) -> list[common.Process]:
            return [stack.enter_context(common.service(kind, count, **settings)) for count in threads]

        policy = start("policy", model=str(folder))
        reference = start("reference", model=str(folder))
        reward = start("reward", scorers=[scorer])
        clients = OverGrpc(
            [(one.target, one.weights_target) for one in policy],
            [one.target for one in reward],
            [one.target for one in reference],
            fingerprint,
        )
        try:
            yield clients
        finally:
            clients.close()


def main() -> None:
    arguments = command_line(__doc__, "services", rounds=5, model=True).parse_args()
    torch.set_num_threads(arguments.threads)
    folder = base_model(arguments)
    limits = common.ceilings()
    with tempfile.TemporaryDirectory() as scratch:
        reward = make_reward_model(folder, Path(scratch) / "reward")
        report = run(folder, reward, arguments.rounds, arguments.threads)
    names = ("in process", "gRPC", "gRPC, empty engine")
    print()
    table(("48 samples, seconds", *names), [[p, *(v[n] for n in names)] for p, v in report["phases"].items()])
    print(
        f"an update takes {report['update_seconds']:.2f} s; tax {100 * report['tax']:.2f} % of it "
        f"(difference of the large numbers {100 * report['difference']:.1f} %), target at most 3 %\n"
    )
    cases = [[c["replicas"], c["threads_each"], c["generate"], c["reference"], c["reward"]] for c in report["replicas"]]
    table(("replicas of each", "threads each", "generate s", "reference s", "reward s"), cases)
    print("ceilings", limits)
    write({**heading(arguments.threads), "ceilings": limits, **report}, arguments.out)


if __name__ == "__main__":
    main()
