"""Keeps the services of a run alive: start, wait until ready, restart after a crash, stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steersman.errors import UnavailableError
from steersman.local import process
from steersman.local.process import Child
from steersman.progress import ConsoleReporter

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds before a crashed service is started again; doubled with every crash."""
MAX_CRASHES = 6
"""Crashes in a row, without having been ready between them, after which the run gives up."""


@dataclass(frozen=True)
class Service:
    """A service that a stage needs."""

    name: str
    """Unique among the run's services, for example `policy-0`; names the log and the configuration file."""
    module: str
    """Entry point, for example `services.policy`."""
    health: str | None
    """gRPC name that grpc.health.v1 is asked about; None: not a gRPC service."""
    config: Mapping[str, Any]
    """Configuration without ports, keys in camelCase."""
    ports: tuple[str, ...] = ("port",)
    """Configuration keys that get a port each, the health's first."""
    fixed_ports: Mapping[str, int] = field(default_factory=dict)
    """Ports that users know, by configuration key; all others are any free ones."""


@dataclass
class _Running:
    service: Service
    ports: dict[str, int]
    process: Child
    ready: bool = False
    crashes: int = 0
    restart_at: float | None = None
    """Monotonic time at which it is to be started again; None: it runs."""
    channel: grpc.Channel | None = None
    started: float = field(default_factory=time.monotonic)


class Supervisor:
    """Owns the service processes; use it as a context manager, and from one thread."""

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        start_timeout: float,
        start: process.Start = process.start,
    ) -> None:
        """Args:
        folder: gets `<name>.yaml` and `<name>.log` of every service.
        environment: of the children.
        start_timeout: seconds until a service has to be ready.
        start: how a process is started.
        """
        self._folder = folder
        self._environment = environment
        self._start_timeout = start_timeout
        self._start_process = start
        self._running: dict[str, _Running] = {}

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def ensure(self, services: list[Service]) -> None:
        """Makes exactly these services run, and waits until all are ready.

        One whose configuration stays the same keeps running.

        Raises:
            UnavailableError: one cannot be started, with its own reason.
        """
        wanted = {service.name: service for service in services}
        self._stop([name for name, running in self._running.items() if wanted.get(name) != running.service])
        missing = [service for service in services if service.name not in self._running]
        if missing:
            with ConsoleReporter("services") as reporter:
                for service in missing:
                    self._launch(service)
                self._wait(reporter)

    def port(self, name: str, key: str = "port") -> int:
        """The port that a running service was given."""
        return self._running[name].ports[key]

    def tend(self) -> list[str]:
        """Starts services again that have crashed; call it a few times a second. Returns what there is to tell.

        Raises:
            UnavailableError: a service crashes again and again.
        """
        told = []
        for running in self._running.values():
            name = running.service.name
            if running.restart_at is not None:
                if time.monotonic() >= running.restart_at:
                    self._spawn(running)
            elif running.process.poll() is not None:
                self._note_crash(running)
                told.append(
                    f"{name} ended ({_cause(running)}): {process.last_words(self.log(name))}; "
                    "it is started again on the same port"
                )
            elif not running.ready and self._is_ready(running):
                running.ready, running.crashes = True, 0
                told.append(f"{name} is ready")
        return told

    def pid(self, name: str) -> int:
        """Process id of a service."""
        return self._running[name].process.pid

    def stop(self) -> None:
        """Ends all services: drain, then kill."""
        self._stop(list(self._running))

    def _stop(self, names: list[str]) -> None:
        ending = [self._running.pop(name) for name in names]
        for running in ending:
            if running.channel is not None:
                running.channel.close()
        process.stop([running.process for running in ending if running.restart_at is None])

    def _launch(self, service: Service) -> None:
        taken = {port for running in self._running.values() for port in running.ports.values()}
        free = process.free_ports(len(service.ports), taken | set(service.fixed_ports.values()))
        ports = {**dict(zip(service.ports, free, strict=True)), **service.fixed_ports}
        path = self._folder / f"{service.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({**service.config, **ports}, sort_keys=False), encoding="utf-8")
        self._running[service.name] = _Running(service, ports, self._start(service))

    def _spawn(self, running: _Running) -> None:
        running.process = self._start(running.service)
        running.restart_at, running.started = None, time.monotonic()

    def _start(self, service: Service) -> Child:
        config = str(self._folder / f"{service.name}.yaml")
        return self._start_process(
            service.module, ["--config", config], self.log(service.name), self._environment, own_output=True
        )

    def log(self, name: str) -> Path:
        """Log file of a service."""
        return self._folder / f"{name}.log"

    def _note_crash(self, running: _Running) -> None:
        if running.channel is not None:
            running.channel.close()
            running.channel = None
        running.ready = False
        running.crashes += 1
        if running.crashes >= MAX_CRASHES:
            raise UnavailableError(
                f"{running.service.name} crashed {running.crashes} times in a row ({_cause(running)}): "
                f"{process.last_words(self.log(running.service.name))}"
            )
        running.restart_at = time.monotonic() + min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (running.crashes - 1))

    def _wait(self, reporter: ConsoleReporter) -> None:
        """Until all services are ready; one that ends before it was ready for the first time has a real fault."""
        start = time.monotonic()
        while waiting := [running for running in self._running.values() if not running.ready]:
            for running in waiting:
                name = running.service.name
                if running.process.poll() is not None:
                    raise UnavailableError(
                        f"{name} could not be started ({_cause(running)}): {process.last_words(self.log(name))}"
                    )
                if self._is_ready(running):
                    running.ready = True
                    reporter.note(f"{name} is ready after {time.monotonic() - running.started:.1f} s")
                elif time.monotonic() - start > self._start_timeout:
                    raise UnavailableError(
                        f"{name} is not ready after {self._start_timeout:.0f} s; {self.log(name)} has its log, "
                        "spec.services.startTimeoutSeconds the limit"
                    )
            reporter.activity("loading " + ", ".join(running.service.name for running in waiting))
            time.sleep(0.2)

    def _is_ready(self, running: _Running) -> bool:
        if running.service.health is None:
            return not process.is_free(running.ports[running.service.ports[0]])
        if running.channel is None:
            running.channel = grpc.insecure_channel(f"127.0.0.1:{running.ports[running.service.ports[0]]}")
        try:
            request = health_pb2.HealthCheckRequest(service=running.service.health)
            answer = health_pb2_grpc.HealthStub(running.channel).Check(request, timeout=1)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _cause(running: _Running) -> str:
    assert running.process.returncode is not None  # it has ended
    return process.cause(running.process.returncode)
