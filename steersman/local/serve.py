"""Serves a model on this machine: the policy service and the gateway before it, until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.config.stages import read_complete
from steersman.demo.shop import gateway_options, open_shop
from steersman.errors import ConfigError, NotFoundError
from steersman.local import folder, process
from steersman.local.services import DRAIN_SECONDS, GRPC_NAMES
from steersman.local.supervisor import Service, Supervisor
from steersman.progress import say

PORT, GRPC_PORT = 8080, 8081
LAST_PORT = 65_535
_POLICY_STAGES = ("sft", "rl", "rejection_sampling", "dpo", "kto", "release")


def find_model(path: Path) -> tuple[Path, str, dict[str, Any]]:
    """What to serve: folder, name, and options of the policy service.

    Args:
        path: a model folder, or a run's folder, whose newest trained model is served.

    Raises:
        NotFoundError: neither of them.
    """
    if (path / "config.json").is_file():
        return path.resolve(), _served_name(path.resolve().name), {}
    manifest = folder.manifest_path(path)
    if not manifest.is_file():
        raise NotFoundError(f"{path} is neither a model folder (config.json) nor a run's folder (manifest.yaml)")
    run = folder.load_manifest(manifest)
    model = run.spec.model
    options = {"precision": model.precision, "device": model.device, "threads": model.threads}
    stages = list(zip(run.stage_names(), run.spec.stages, strict=True))
    for name, stage in reversed(stages):
        if stage.kind in _POLICY_STAGES and read_complete(path, name):
            return (path / name / "model").resolve(), run.metadata.name, options
    raise NotFoundError(f"{path} has no complete stage that trained a model; run it first: steersman run")


def store_of(path: Path, store: str | None) -> str | None:
    """URL of the database with answers and feedback: the given one, or a run's own; None: nothing is kept.

    Args:
        path: what is served.
        store: a database URL or the name of an SQLite file.
    """
    if store is None:
        own = path.absolute() / "feedback.db"
        return f"sqlite:///{own}" if folder.manifest_path(path).is_file() else None
    return store if "://" in store else f"sqlite:///{Path(store).absolute()}"


def serve(path: Path, logs: Path, port: int = PORT, grpc_port: int = GRPC_PORT, *, store: str | None = None) -> None:
    """Serves until it is interrupted, which is its orderly end.

    Args:
        path: a model folder or a run's folder.
        logs: folder for configuration and logs of the two services.
        port, grpc_port: of the gateway; the next free one where it is taken.
        store: see `store_of`.
    """
    database = store_of(path, store)
    with serving(path, logs, {"port": port, "grpcPort": grpc_port}, database) as served:
        say("serve", f"{served.model} as '{served.name}'")
        say("serve", f"answers and feedback go to {database or 'nowhere: --store FILE keeps them'}")
        say("serve", f"chat page {served.url}/  OpenAI API {served.url}/v1  Ctrl-C stops it")
        try:
            while True:
                for told in served.supervisor.tend():
                    say("serve", told)
                time.sleep(0.2)
        except KeyboardInterrupt:
            say("serve", "stopping")


@dataclass(frozen=True)
class Served:
    """A gateway and its policy service that run."""

    model: Path
    name: str
    """As clients call the model."""
    url: str
    """Of the gateway."""
    supervisor: Supervisor


@contextmanager
def serving(path: Path, logs: Path, wanted: Mapping[str, int], database: str | None) -> Iterator[Served]:
    """Runs the policy service and the gateway while the block lasts.

    Args:
        path: a model folder or a run's folder; a run on the demo's data is served with the demo's shop behind it.
        logs: folder for configuration and logs of the two services.
        wanted: ports by configuration key; the next free ones where they are taken. Empty: any.
        database: URL of the gateway's database; None: a temporary one.
    """
    model, name, options = find_model(path)
    config = {"host": "127.0.0.1", "drainSeconds": DRAIN_SECONDS, "model": str(model), "modelName": name, **options}
    config["weightsPort"] = None  # nobody publishes to it
    policy = Service("policy", "services.policy", GRPC_NAMES["policy"], config)
    environment = process.child_environment(options.get("threads", 0), offline=True)
    with Supervisor(logs, environment, start_timeout=300.0) as supervisor:
        supervisor.ensure([policy])
        ports: dict[str, int] = {}
        for key, port in wanted.items():
            ports[key] = _free_from(port, key, taken=ports.values())
        gateway = {
            "host": "127.0.0.1",
            "drainSeconds": DRAIN_SECONDS,
            "model": name,
            "database": database,
            "policy": {"endpoints": [f"127.0.0.1:{supervisor.port('policy')}"]},
            **_of_the_run(path, logs),
        }
        service = Service("gateway", "services.gateway", None, gateway, ("port", "grpcPort"), ports)
        supervisor.ensure([policy, service])
        yield Served(model, name, f"http://127.0.0.1:{supervisor.port('gateway')}", supervisor)


def _of_the_run(path: Path, logs: Path) -> dict[str, Any]:
    """What a run says about the gateway before its model: the temperature it was trained at, and the demo's shop."""
    manifest = folder.manifest_path(path)
    if not manifest.is_file():
        return {}
    run = folder.load_manifest(manifest)
    online = [stage.rl or stage.rejection_sampling for stage in run.spec.stages if stage.rl or stage.rejection_sampling]
    options: dict[str, Any] = {}
    if online and online[-1] is not None:
        options["defaults"] = {"temperature": online[-1].generation.temperature}
    if run.spec.data.demo is not None:
        options |= gateway_options(open_shop(run.spec.seed), logs / "shop.json")
    return options


def _free_from(port: int, field: str, taken: Container[int] = ()) -> int:
    """The port, or the next free one with a word about it.

    Raises:
        ConfigError: none of the 200 ports from there on is free.
    """
    candidates = range(port, min(port + 200, LAST_PORT + 1))
    free = next((number for number in candidates if number not in taken and process.is_free(number)), None)
    if free is None:
        raise ConfigError(f"{field}: no port from {port} to {candidates[-1]} is free; choose another")
    if free != port:
        say("serve", f"{field} {port} is taken, the gateway takes {free}")
    return free


def _served_name(folder_name: str) -> str:
    """A model name as clients may write it."""
    kept = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in folder_name)
    return kept.lstrip("._-") or "model"
