"""Serves a model on this machine: the policy service and the gateway before it, until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Container
from pathlib import Path
from typing import Any

from steersman.config.stages import read_complete
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
    model, name, options = find_model(path)
    database = store_of(path, store)
    config = {"host": "127.0.0.1", "drainSeconds": DRAIN_SECONDS, "model": str(model), "modelName": name, **options}
    policy = Service("policy", "services.policy", GRPC_NAMES["policy"], config, ("port", "weightsPort"))
    environment = process.child_environment(options.get("threads", 0), offline=True)
    with Supervisor(logs, environment, start_timeout=300.0) as supervisor:
        supervisor.ensure([policy])
        port = _free_from(port, "port")
        grpc_port = _free_from(grpc_port, "grpcPort", taken=(port,))
        gateway = Service(
            "gateway",
            "services.gateway",
            None,
            {
                "host": "127.0.0.1",
                "drainSeconds": DRAIN_SECONDS,
                "model": name,
                "database": database,
                "policy": {"endpoints": [f"127.0.0.1:{supervisor.port('policy')}"]},
            },
            ("port", "grpcPort"),
            {"port": port, "grpcPort": grpc_port},
        )
        supervisor.ensure([policy, gateway])
        say("serve", f"{model} as '{name}'")
        say("serve", f"answers and feedback go to {database or 'nowhere: --store FILE keeps them'}")
        say("serve", f"chat page http://127.0.0.1:{port}/  OpenAI API http://127.0.0.1:{port}/v1  Ctrl-C stops it")
        try:
            while True:
                for told in supervisor.tend():
                    say("serve", told)
                time.sleep(0.2)
        except KeyboardInterrupt:
            say("serve", "stopping")


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
