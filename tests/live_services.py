"""Real policy, reward and reference servers around tiny models, on an event loop in a thread of the test.

A pytest plugin for all suites. What needs torch is imported when a server starts, so that suites
without models stay quick.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from steersman.config.base import dump_yaml, load_model
from steersman.config.manifest import AlignmentRun
from steersman.rpc.server import Server
from steersman.v1 import policy_pb2_grpc, reference_pb2_grpc, reward_pb2_grpc, weights_pb2_grpc


class LoopThread:
    """An event loop that the test's thread can hand coroutines to."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


@dataclass
class Cluster:
    """Running servers; `services` is what a manifest says of them."""

    loop: LoopThread
    servers: list[Server] = field(default_factory=list)
    endpoints: dict[str, list[str]] = field(default_factory=dict)
    weights_folder: Path | None = None
    """What the trainer publishes through; None: gRPC."""
    server_options: dict[str, Any] = field(default_factory=dict)
    """Of every server: TLS, the token."""
    client_options: dict[str, Any] = field(default_factory=dict)
    """What a manifest says of every service besides its endpoints."""

    def start_policy(self, model: Path, **options: Any) -> None:
        from services.policy.build import build_engine, load_chat_format
        from services.policy.config import PolicyConfig
        from services.policy.servicer import PolicyServicer
        from services.policy.weights import WeightsServicer

        config = PolicyConfig(
            model=str(model), port=0, weights_port=0, precision="fp32", threads=1, drain_seconds=0,
            **self.server_options, **options,
        )  # fmt: skip
        engine = build_engine(config)
        data = policy_pb2_grpc.add_PolicyServiceServicer_to_server
        control = weights_pb2_grpc.add_WeightsServiceServicer_to_server

        async def close() -> None:
            await asyncio.to_thread(engine.close)

        async def start() -> Server:
            listeners = [
                (0, [(data, PolicyServicer(engine, load_chat_format(config)), "steersman.v1.PolicyService")]),
                (0, [(control, WeightsServicer(engine, config), "steersman.v1.WeightsService")]),
            ]
            server = Server(config, listeners, on_drain=close)
            await server.start()
            await asyncio.to_thread(engine.start)
            await server.ready()
            return server

        server = self.loop.run(start())
        self._add(server, "policy", "weights")

    def start_reward(self, scorers: list[dict[str, Any]], **options: Any) -> None:
        from services.reward.config import RewardConfig
        from services.reward.engine import RewardEngine
        from services.reward.servicer import RewardServicer

        raw = {
            "port": 0,
            "precision": "fp32",
            "threads": 1,
            "drainSeconds": 0,
            "scorers": scorers,
            **self.server_options,
            **options,
        }
        config = load_model(RewardConfig, raw, "test")
        engine = RewardEngine(config)
        register = reward_pb2_grpc.add_RewardServiceServicer_to_server
        self._start(config, engine, lambda: RewardServicer(engine, config), register, "reward", "RewardService")

    def start_reference(self, model: Path, **options: Any) -> None:
        from services.reference.config import ReferenceConfig
        from services.reference.engine import ReferenceEngine
        from services.reference.servicer import ReferenceServicer

        options = {**self.server_options, **options}
        config = ReferenceConfig(model=str(model), port=0, precision="fp32", threads=1, drain_seconds=0, **options)
        engine = ReferenceEngine(config)
        register = reference_pb2_grpc.add_ReferenceServiceServicer_to_server
        name = "ReferenceService"
        self._start(config, engine, lambda: ReferenceServicer(engine, config), register, "reference", name)

    def _start(self, config: Any, engine: Any, servicer: Callable, register: Any, kind: str, name: str) -> None:
        async def start() -> Server:
            made = servicer()
            server = Server(config, [(0, [(register, made, f"steersman.v1.{name}")])], on_drain=made.batcher.close)
            await server.start()
            await asyncio.to_thread(engine.load)
            await server.ready()
            return server

        self._add(self.loop.run(start()), kind)

    def _add(self, server: Server, *kinds: str) -> None:
        self.servers.append(server)
        for kind, port in zip(kinds, server.ports, strict=True):
            self.endpoints.setdefault(kind, []).append(f"127.0.0.1:{port}")

    def services(self) -> dict[str, Any]:
        policy = {
            "endpoints": self.endpoints["policy"],
            "weightsEndpoints": self.endpoints["weights"],
            "weightsFolder": str(self.weights_folder) if self.weights_folder else None,
            **self.client_options,
        }
        others = {kind: {"endpoints": self.endpoints[kind], **self.client_options} for kind in ("reward", "reference")}
        return {"policy": policy, **others, "startTimeoutSeconds": 5}

    def close(self) -> None:
        for server in self.servers:
            self.loop.run(server.drain())
        self.loop.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    running = Cluster(LoopThread())
    yield running
    running.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with a byte-level tokenizer."""
    from steersman.testing.models import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run_manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes prompts and a manifest with one stage, runs it, and returns the stage's folder."""
    from training.stage import run_stage

    def run(
        cluster: Cluster, model: Path, stage: dict[str, Any], *, prompts: list[str], name: str = "run", **spec: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        rows = [{"id": text, "prompt": [{"role": "user", "content": text}]} for text in prompts]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest = {
            "apiVersion": "steersman.dev/v1alpha1",
            "kind": "AlignmentRun",
            "metadata": {"name": name},
            "spec": {
                "seed": 3,
                "model": {"base": str(model), "precision": "fp32", "device": "cpu", "threads": 1},
                "data": {"prompts": {"train": "prompts.jsonl"}},
                "services": cluster.services(),
                "stages": [stage],
                **spec,
            },
        }
        run = load_model(AlignmentRun, manifest, "test")
        (folder / "manifest.yaml").write_text(dump_yaml(run))
        (stage_name,) = run.stage_names()
        run_stage(folder, stage_name, [])
        return folder / stage_name

    return run
