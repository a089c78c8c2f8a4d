"""Serves a model on this machine: the policy service and the gateway before it, until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.config.manifest import Canary, OnlineStage, ReleaseStage, load_manifest
from steersman.config.stages import read_complete
from steersman.demo.shop import gateway_options, open_shop
from steersman.errors import ConfigError, NotFoundError
from steersman.local import folder, process
from steersman.local.canary import LOOK_SECONDS, UNREADABLE, SideBySide
from steersman.local.services import DRAIN_SECONDS, GRPC_NAMES
from steersman.local.supervisor import Service, Supervisor
from steersman.progress import say

PORT, GRPC_PORT = 8080, 8081
LAST_PORT = 65_535


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
    run = load_manifest(manifest)
    model = run.spec.model
    options = {"precision": model.precision, "device": model.device, "threads": model.threads}
    for name, stage in reversed(run.stages()):
        if (stage.trains_policy or isinstance(stage, ReleaseStage)) and read_complete(path, name):
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


def serve(
    path: Path,
    logs: Path,
    port: int = PORT,
    grpc_port: int = GRPC_PORT,
    *,
    store: str | None = None,
    candidate: Path | None = None,
    percent: int = 50,
) -> None:
    """Serves until it is interrupted, which is its orderly end.

    Args:
        path: a model folder or a run's folder.
        logs: folder for configuration and logs of the two services.
        port, grpc_port: of the gateway; the next free one where it is taken.
        store: see `store_of`.
        candidate: another model folder or run, which answers a share of the conversations; it is taken back or gets
            all of them when the judgements, errors and times allow to say so.
        percent: that share.
    """
    database = store_of(path, store)
    if candidate is not None and database is None:
        raise ConfigError("--candidate is decided by judgements: --store FILE keeps them")
    ports = {"port": port, "grpcPort": grpc_port}
    with serving(path, logs, ports, database, candidate, percent) as served:
        say("serve", f"{served.model} as '{served.name}'")
        if served.canary is not None:
            say("serve", f"{served.canary.state.candidate} answers {percent}% of the conversations")
        say("serve", f"answers and feedback go to {database or 'nowhere: --store FILE keeps them'}")
        say("serve", f"chat page {served.url}/  OpenAI API {served.url}/v1  Ctrl-C stops it")
        looked = time.monotonic()
        try:
            while True:
                for told in served.supervisor.tend():
                    say("serve", told)
                if served.canary is not None and time.monotonic() - looked > LOOK_SECONDS:
                    looked = time.monotonic()
                    _look(served.canary, str(database), served.metrics_url)
                time.sleep(0.2)
        except KeyboardInterrupt:
            say("serve", "stopping")


def _look(canary: SideBySide, database: str, metrics_url: str) -> None:
    """What cannot be read decides nothing and ends nothing."""
    try:
        told = canary.look(database, metrics_url)
    except UNREADABLE as error:
        told = f"the candidate cannot be judged now ({error})"
    if told:
        say("serve", told)


@dataclass(frozen=True)
class Served:
    """A gateway and its policy service that run."""

    model: Path
    name: str
    """As clients call the model."""
    url: str
    """Of the gateway."""
    supervisor: Supervisor
    metrics_url: str = ""
    """Of the gateway, where a candidate is watched."""
    canary: SideBySide | None = None


@contextmanager
def serving(
    path: Path,
    logs: Path,
    wanted: Mapping[str, int],
    database: str | None,
    candidate: Path | None = None,
    percent: int = 50,
) -> Iterator[Served]:
    """Runs the policy service and the gateway while the block lasts.

    Args:
        path: a model folder or a run's folder; a run on the demo's data is served with the demo's shop behind it.
        logs: folder for configuration and logs of the two services.
        wanted: ports by configuration key; the next free ones where they are taken. Empty: any.
        database: URL of the gateway's database; None: a temporary one.
        candidate, percent: see `serve`.
    """
    model, name, options = find_model(path)
    policies = [_policy("policy", model, name, options)]
    if candidate is not None:
        policies.append(_policy("candidate", find_model(candidate)[0], name, options))
    environment = process.child_environment(options.get("threads", 0), offline=True)
    with Supervisor(logs, environment, start_timeout=300.0) as supervisor:
        supervisor.ensure(policies)
        canary = None
        if candidate is not None:
            endpoint = f"127.0.0.1:{supervisor.port('candidate')}"
            canary = SideBySide(logs, (model, find_model(candidate)[0]), endpoint, percent, Canary())
        ports: dict[str, int] = {}
        for key, port in wanted.items():
            ports[key] = _free_from(port, key, taken=ports.values())
        gateway = {
            "host": "127.0.0.1",
            "drainSeconds": DRAIN_SECONDS,
            "model": name,
            "database": database,
            "policy": {
                "endpoints": [f"127.0.0.1:{supervisor.port('policy')}"],
                **({"split": str(canary.split)} if canary is not None else {}),
            },
            **_of_the_run(path, logs),
        }
        service = Service("gateway", "services.gateway", None, gateway, ("port", "grpcPort"), ports)
        supervisor.ensure([*policies, service])
        url = f"http://127.0.0.1:{supervisor.port('gateway')}"
        yield Served(model, name, url, supervisor, f"{url}/metrics", canary)


def _policy(service: str, model: Path, name: str, options: Mapping[str, Any]) -> Service:
    config = {"host": "127.0.0.1", "drainSeconds": DRAIN_SECONDS, "model": str(model), "modelName": name, **options}
    config["weightsPort"] = None  # nobody publishes to it
    return Service(service, "services.policy", GRPC_NAMES["policy"], config)


def _of_the_run(path: Path, logs: Path) -> dict[str, Any]:
    """What a run says about the gateway before its model: the temperature it was trained at, and the demo's shop."""
    manifest = folder.manifest_path(path)
    if not manifest.is_file():
        return {}
    run = load_manifest(manifest)
    online = [stage for _, stage in run.stages() if isinstance(stage, OnlineStage)]
    options: dict[str, Any] = {}
    if online:
        options["defaults"] = {"temperature": online[-1].generation.temperature}
    report = path.absolute() / "report" / "report.html"
    if report.is_file():
        options["report"] = str(report)
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
