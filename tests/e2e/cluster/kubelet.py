"""A kubelet for tests: pods bound to a node of the API server's mock, run as processes (`sandbox.Container`).

What a node does that decides whether an image starts: volumes as folders, mounts and their modes, variables, uid, a
read-only root, the entry point, init containers, probes, restarts, SIGTERM and grace, log, exit code and termination
message. Every pod has a loopback address of its own, which stands for its network: servers that listen on all addresses
get that one, and /etc/hosts has the names of Services and pods.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
from fake_kube import FakeKube, Json
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sandbox import IMAGE_ENVIRONMENT, Container, Mount

NODE = "node-1"
TICK = 0.1
ENTRYPOINT = ["python", "-m"]
"""Of both Dockerfiles."""
LOG_CHARS = 4096
BUSY = 20
"""How much longer than a cluster's the probes wait here: what is slow on a loaded machine is not ill."""


@dataclass(frozen=True)
class Ending:
    """How a container ended that was told to stop."""

    pod: str
    container: str
    code: int
    seconds: float
    killed: bool
    """SIGTERM did not end it within its grace period."""


@dataclass
class Running:
    """A container of a pod."""

    spec: Json
    log: Path
    process: Container | None = None
    restarts: int = 0
    state: Json = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last_state: Json = field(default_factory=dict)
    started: bool = False
    ready: bool = False
    begun: float = 0.0
    failures: int = 0
    """Probes in a row that said no."""
    restart_at: float | None = None
    asked_at: dict[str, float] = field(default_factory=dict)

    def due(self, kind: str, probe: Json) -> bool:
        """Whether it is time for a probe: sooner than in a cluster, but a command costs a process."""
        pause = min(float(probe.get("periodSeconds", 10)), 3.0 if kind == "startupProbe" else 10.0)
        pause = pause if "exec" in probe else 0.3
        if time.monotonic() - self.asked_at.get(kind, -pause) < pause:
            return False
        self.asked_at[kind] = time.monotonic()
        return True

    def status(self) -> Json:
        return {
            "name": self.spec["name"],
            "state": self.state,
            "lastState": self.last_state,
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
        }


class Kubelet:
    """Runs the pods of one node until it is stopped; use it as an async context manager."""

    def __init__(self, kube: FakeKube, folder: Path, claims: dict[str, Path], host_mounts: list[Mount]) -> None:
        """Args:
        kube: the state of the API server.
        folder: for volumes, roots and logs.
        claims: folder by name of a PersistentVolumeClaim.
        host_mounts: what every container gets besides its own mounts.
        """
        self.kube = kube
        self.folder = folder
        self.claims = claims
        self.host_mounts = host_mounts
        self.endings: list[Ending] = []
        self._pods: dict[str, Pod] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None
        block = os.getpid() % 32_000  # several of these clusters may run on one machine
        self._addresses = (f"127.{100 + block // 250}.{block % 250}.{number}" for number in range(2, 250))
        kube.pod_log = self._pod_log  # type: ignore[method-assign]

    async def __aenter__(self) -> Kubelet:
        self._loop = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.cancel()
        for pod in self._pods.values():
            pod.kill()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(self._loop, *self._tasks.values(), return_exceptions=True)

    def pod(self, name: str) -> Pod:
        return self._pods[name]

    def crashing(self) -> list[str]:
        """Containers that have ended by themselves again and again.

        Raises:
            whatever ended a pod's task: something in it that this kubelet does not model.
        """
        for task in self._tasks.values():
            if task.done() and not task.cancelled():
                task.result()
        return [
            f"{pod.name}/{container.spec['name']}"
            for pod in self._pods.values()
            for container in pod.containers
            if container.restarts > 2
        ]

    def log(self, pod: str, container: str | None = None) -> str:
        """What a pod has written so far."""
        found = self._pods.get(pod)
        names = (
            [running.log for running in found.containers if container in (None, running.spec["name"])] if found else []
        )
        return "".join(path.read_text(errors="replace") for path in names if path.exists())

    async def _pod_log(self, namespace: str, name: str, lines: int) -> str:
        return "\n".join(self.log(name, None).splitlines()[-lines:])

    async def _watch(self) -> None:
        """Starts what is bound to this node, and ends what is gone from the API server."""
        while True:
            if problem := next((task for task in self._tasks.values() if task.done() and task.exception()), None):
                problem.result()
            wanted = {
                body["metadata"]["name"]: body
                for (kind, _, _), body in list(self.kube.objects.items())
                if kind == "Pod" and body["spec"].get("nodeName") == NODE
            }
            for name, body in wanted.items():
                uid = body["metadata"]["uid"]
                if name not in self._pods:
                    pod = Pod(self, body, next(self._addresses))
                    self._pods[name] = pod
                    self._tasks[uid] = asyncio.create_task(pod.run())
                elif self._pods[name].uid != uid and self._pods[name].ended:
                    del self._pods[name]
            for pod in self._pods.values():
                if pod.name not in wanted or wanted[pod.name]["metadata"]["uid"] != pod.uid:
                    pod.stop()
            self._write_hosts()
            await asyncio.sleep(TICK)

    def _write_hosts(self) -> None:
        """Names of pods and Services, into the file that every container has as /etc/hosts."""
        lines = []
        living = [pod for pod in self._pods.values() if not pod.ended]
        for pod in living:
            spec, namespace = pod.body["spec"], pod.body["metadata"]["namespace"]
            if spec.get("subdomain"):
                host = f"{spec.get('hostname', pod.name)}.{spec['subdomain']}"
                lines.append(f"{pod.address} {host}.{namespace}.svc {host}")
        for (kind, namespace, name), body in list(self.kube.objects.items()):
            selector = body["spec"].get("selector", {}) if kind == "Service" else {}
            for pod in living:
                labels = pod.body["metadata"].get("labels", {})
                if selector and selector.items() <= labels.items():
                    lines.append(f"{pod.address} {name}.{namespace}.svc {name}")
        text = "\n".join(sorted(lines)) + "\n"
        for pod in living:
            pod.write_hosts(text)


class Pod:
    """One pod and its containers."""

    def __init__(self, kubelet: Kubelet, body: Json, address: str) -> None:
        self.kubelet = kubelet
        self.body = body
        self.name: str = body["metadata"]["name"]
        self.uid: str = body["metadata"]["uid"]
        self.address = address
        self.ended = False
        self._stopping: float | None = None
        self._folder = kubelet.folder / f"{self.name}-{self.uid}"
        self._folder.mkdir(parents=True)
        self._hosts = self._folder / "hosts"
        self._hosts_text = ""
        self.write_hosts("")
        spec = body["spec"]
        self.inits = [self._container(item) for item in spec.get("initContainers") or []]
        self.containers = [self._container(item) for item in spec["containers"]]
        self._phase = "Pending"
        self._said: Json = {}

    def _container(self, spec: Json) -> Running:
        return Running(spec, self._folder / f"{spec['name']}.log")

    def write_hosts(self, text: str) -> None:
        """In place: the file is mounted."""
        if text != self._hosts_text or not self._hosts.exists():
            self._hosts_text = text
            with self._hosts.open("w") as file:
                # Probes inside the pod ask localhost, which is the pod's own network.
                file.write(f"{self.address} localhost\n{text}")

    # Life

    async def run(self) -> None:
        spec = self.body["spec"]
        never = spec.get("restartPolicy", "Always") == "Never"
        try:
            for init in self.inits:
                if not await self._run_init(init, never):
                    self._phase = "Failed"
                    return
            for container in self.containers:
                self._start(container)
            self._phase = "Running"
            while self._stopping is None:
                for container in self.containers:
                    await self._look_after(container, never)
                self._tell()
                if never and all("terminated" in container.state for container in self.containers):
                    failed = any(container.state["terminated"]["exitCode"] for container in self.containers)
                    self._phase = "Failed" if failed else "Succeeded"
                    return
                await asyncio.sleep(TICK)
            await self._terminate()
        finally:
            self.kill()
            self.ended = True
            self._tell()

    async def _run_init(self, init: Running, never: bool) -> bool:
        while self._stopping is None:
            self._start(init)
            self._tell()
            assert init.process is not None
            while (code := init.process.poll()) is None:
                if self._stopping is not None:
                    await self._terminate([init])
                    return False
                await asyncio.sleep(TICK)
            self._note_end(init, code)
            if code == 0:
                init.ready = True
                return True
            if never:
                return False
            await asyncio.sleep(1.0)
        return False

    async def _look_after(self, container: Running, never: bool) -> None:
        if container.process is None:
            if container.restart_at is not None and time.monotonic() > container.restart_at:
                container.restarts += 1
                self._start(container)
            return
        code = container.process.poll()
        if code is not None:
            container.process = None
            self._note_end(container, code)
            if not never:
                container.last_state, container.state = container.state, {"waiting": {"reason": "CrashLoopBackOff"}}
                container.restart_at = time.monotonic() + min(10.0, 0.5 * 2**container.restarts)
            return
        await self._probe(container)

    def stop(self) -> None:
        """As after a deletion: the pod's containers get SIGTERM, and after the grace period SIGKILL."""
        if self._stopping is None:
            self._stopping = time.monotonic()

    async def _terminate(self, containers: list[Running] | None = None) -> None:
        running = [item for item in containers or self.containers if item.process and item.process.poll() is None]
        begin = time.monotonic()
        for container in running:
            container.process.signal(signal.SIGTERM)  # type: ignore[union-attr]
        grace = float(self.body["spec"].get("terminationGracePeriodSeconds", 30)) * BUSY
        while any(item.process.poll() is None for item in running) and time.monotonic() - begin < grace:  # type: ignore[union-attr]  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        for container in running:
            killed = container.process.poll() is None  # type: ignore[union-attr]
            container.process.kill()  # type: ignore[union-attr]
            code = container.process.wait(10)  # type: ignore[union-attr]
            self._note_end(container, code)
            name = container.spec["name"]
            self.kubelet.endings.append(Ending(self.name, name, code, time.monotonic() - begin, killed))

    def kill(self) -> None:
        """At once, as when a node dies."""
        for container in [*self.inits, *self.containers]:
            if container.process is not None:
                container.process.kill()

    def crash(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """One container's process number 1 gets a signal from outside."""
        container = next(item for item in self.containers if item.spec["name"] == name)
        assert container.process is not None
        container.process.signal(number)

    # Containers

    def _start(self, container: Running) -> None:
        spec = container.spec
        environment = {**IMAGE_ENVIRONMENT, **self._environment(spec)}
        command = spec.get("command") or ENTRYPOINT
        arguments = [_expand(word, environment) for word in [*command, *(spec.get("args") or [])]]
        context = {**self.body["spec"].get("securityContext", {}), **spec.get("securityContext", {})}
        assert context.get("readOnlyRootFilesystem"), f"{self.name}: a writable root is not modelled"
        root = self._folder / f"{spec['name']}-root-{container.restarts}"
        with container.log.open("ab") as log:
            container.process = Container(
                arguments,
                root=root,
                log=log,
                mounts=[*self.kubelet.host_mounts, *self._mounts(spec), Mount(self._hosts, "/etc/hosts")],
                environment=environment,
                uid=context["runAsUser"],
                workdir=spec.get("workingDir", "/tmp"),
            )
        container.begun = time.monotonic()
        container.started = container.ready = False
        container.asked_at = {}
        container.failures = 0
        container.restart_at = None
        container.state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}

    def _note_end(self, container: Running, code: int) -> None:
        container.ready = False
        ended: Json = {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}
        if container.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError" and code:
            ended["message"] = container.log.read_text(errors="replace")[-LOG_CHARS:]
        container.state = {"terminated": ended}

    def _environment(self, spec: Json) -> dict[str, str]:
        found = {"HOSTNAME": self.body["spec"].get("hostname", self.name)}
        for source in spec.get("envFrom") or []:
            found |= self._content(*_reference(source))
        for variable in spec.get("env") or []:
            source = variable.get("valueFrom")
            if source is None:
                found[variable["name"]] = _expand(variable.get("value", ""), found)
            elif "fieldRef" in source:
                found[variable["name"]] = self._field(source["fieldRef"]["fieldPath"])
            else:
                (kind, name), key = _reference(source), next(iter(source.values()))
                content = self._content(kind, name, optional=bool(key.get("optional")))
                if key["key"] in content:
                    found[variable["name"]] = content[key["key"]]
                else:
                    assert key.get("optional"), f"{self.name}: {kind} {name} has no {key['key']}"
        return found

    def _field(self, path: str) -> str:
        if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
            return str(self.body["metadata"].get(match[1], {}).get(match[2], ""))
        return {"metadata.name": self.name, "metadata.namespace": self.body["metadata"]["namespace"]}[path]

    def _content(self, kind: str, name: str, *, optional: bool = False) -> dict[str, str]:
        body = self.kubelet.kube.objects.get((kind, self.body["metadata"]["namespace"], name))
        if body is None:
            assert optional, f"{self.name}: there is no {kind} {name}"
            return {}
        encoded = body.get("data") or {} if kind == "Secret" else {}
        plain = {key: base64.b64decode(value).decode() for key, value in encoded.items()}
        return plain | (body.get("stringData") or {}) | (body.get("data") or {} if kind == "ConfigMap" else {})

    def _mounts(self, spec: Json) -> list[Mount]:
        volumes = {volume["name"]: volume for volume in self.body["spec"].get("volumes") or []}
        found = []
        for mount in spec.get("volumeMounts") or []:
            source = self._volume(volumes[mount["name"]]) / mount.get("subPath", "")
            found.append(Mount(source, mount["mountPath"], bool(mount.get("readOnly"))))
        return sorted(found, key=lambda item: item.path.count("/"))

    def _volume(self, volume: Json) -> Path:
        if "persistentVolumeClaim" in volume:
            return self.kubelet.claims[volume["persistentVolumeClaim"]["claimName"]]
        folder = self._folder / "volumes" / volume["name"]
        if folder.exists():
            return folder
        folder.mkdir(parents=True)
        for kind, key in (("ConfigMap", "configMap"), ("Secret", "secret")):
            if key in volume:
                name = volume[key].get("name") or volume[key]["secretName"]
                optional = bool(volume[key].get("optional"))
                for file, text in self._content(kind, name, optional=optional).items():
                    (folder / file).write_text(text.replace("0.0.0.0", self.address))
        return folder

    # Probes

    async def _probe(self, container: Running) -> None:
        spec = container.spec
        if not container.started:
            probe = spec.get("startupProbe")
            if probe is None or (container.due("startupProbe", probe) and await self._ask(probe, container)):
                container.started = True
            limit = probe["failureThreshold"] * probe.get("periodSeconds", 10) * BUSY if probe else 0
            if not container.started:
                if time.monotonic() - container.begun > limit:
                    container.process.kill()  # type: ignore[union-attr]
                return
        readiness = spec.get("readinessProbe")
        if readiness is None:
            container.ready = True
        elif container.due("readinessProbe", readiness):
            container.ready = await self._ask(readiness, container)
        liveness = spec.get("livenessProbe")
        if liveness is not None and container.due("livenessProbe", liveness):
            container.failures = 0 if await self._ask(liveness, container) else container.failures + 1
            if container.failures >= liveness.get("failureThreshold", 3) * BUSY:
                container.process.signal(signal.SIGTERM)  # type: ignore[union-attr]

    async def _ask(self, probe: Json, container: Running) -> bool:
        if "grpc" in probe:
            return await _serves(f"{self.address}:{probe['grpc']['port']}", probe["grpc"].get("service", ""))
        if "httpGet" in probe:
            port = probe["httpGet"]["port"]
            named = {item["name"]: item["containerPort"] for item in container.spec.get("ports") or []}
            with suppress(httpx.HTTPError):
                async with httpx.AsyncClient(timeout=5 * BUSY) as http:
                    url = f"http://{self.address}:{named.get(port, port)}{probe['httpGet']['path']}"
                    return (await http.get(url)).is_success
            return False
        return (await self._execute(probe["exec"]["command"], container))[0] == 0

    async def execute(self, name: str, *command: str) -> tuple[int, str]:
        """`kubectl exec`: exit code and output of a command in a container."""
        return await self._execute(list(command), next(item for item in self.containers if item.spec["name"] == name))

    async def _execute(self, command: list[str], container: Running) -> tuple[int, str]:
        """In the namespaces of the container, as the container runtime does."""
        pid = container.process.pid if container.process else None
        if pid is None:
            return 1, ""
        enter = ["nsenter", "--target", str(pid), "--user", "--mount", "--root", "--wd", "--preserve-credentials"]
        environment = {**IMAGE_ENVIRONMENT, **self._environment(container.spec)}
        process = await asyncio.create_subprocess_exec(
            *enter,
            *command,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode or 0, output.decode(errors="replace")

    def _tell(self) -> None:
        """Writes the status where it has changed."""
        ready = self._phase == "Running" and all(container.ready for container in self.containers)
        status: Json = {
            "phase": self._phase,
            "podIP": self.address,
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [container.status() for container in self.containers],
        }
        if self.inits:
            status["initContainerStatuses"] = [container.status() for container in self.inits]
        key = ("Pod", self.body["metadata"]["namespace"], self.name)
        current = self.kubelet.kube.objects.get(key)
        if current is not None and current["metadata"]["uid"] == self.uid and status != self._said:
            self._said = status
            current["status"] = status
            self.kubelet.kube._touch(current)


def _reference(source: Json) -> tuple[str, str]:
    """Kind and name of what a variable comes from."""
    (key, value), *_ = source.items()
    return ("Secret" if key.startswith("secret") else "ConfigMap"), value["name"]


def _expand(text: str, variables: dict[str, str]) -> str:
    """`$(NAME)` as Kubernetes replaces it: unknown names stay."""
    replace: Callable[[re.Match[str]], str] = lambda match: variables.get(match[1], match[0])  # noqa: E731
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", replace, text)


async def _serves(target: str, service: str) -> bool:
    async with grpc.aio.insecure_channel(target) as channel:
        with suppress(grpc.RpcError):
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5 * BUSY)
            return answer.status == health_pb2.HealthCheckResponse.SERVING
    return False
