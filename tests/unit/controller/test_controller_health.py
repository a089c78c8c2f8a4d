"""What the probes of the controller say: it lives, it watches and may act, a run would be executed."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import kmock
import pytest
import yaml
from api_server import ApiServer
from fake_kube import TEMPLATES, alignment_run
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.exceptions import ApiException
from operators import PATIENCE, until

from services.controller.config import ControllerConfig
from services.controller.health import RIGHTS_SECONDS, Health, Probes, dry_look
from services.controller.kube import RESOURCES, RIGHTS, Kube
from services.controller.model import Settings

RBAC = Path(__file__).parents[3] / "charts/steersman/templates/controller/rbac.yaml"
CONFIG = ControllerConfig(namespaces=["ml"], resync_seconds=10)


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server, kmock.Server(server):
        yield server


@pytest.fixture
async def kube(api: ApiServer) -> AsyncIterator[Kube]:
    async with ApiClient(Configuration(host=str(api.url).rstrip("/"))) as client:
        yield Kube(client)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_leader_is_ready_when_it_watches_and_lists(kube):
    clock = Clock()
    health = Health(kube, CONFIG, clock)
    assert await health.problem() is None, "a replica that waits could take over"
    health.leading = True
    assert "watches have not started" in str(await health.problem())
    health.watching.set()
    assert "runs of ml could not be listed" in str(await health.problem())
    health.saw_runs("ml")
    assert await health.problem() is None
    health.down = {"resync": "KeyError: 'name'"}
    assert await health.problem() == "resync does not run (KeyError: 'name')"
    health.down = {}
    clock.now += 3 * CONFIG.resync_seconds + 31
    assert "could not be listed lately" in str(await health.problem())


async def test_a_missing_right_is_named_and_asked_for_again(api, kube):
    clock = Clock()
    health = Health(kube, CONFIG, clock)
    api.denied = {("create", "jobs"), ("get", "pods")}
    problem = await health.problem()
    assert "may not get Pod in ml, get Pod/log in ml, create Job in ml; check the chart's rbac" in str(problem)
    api.denied = set()
    assert await health.problem() == problem, "not at every probe"
    clock.now += RIGHTS_SECONDS / 10 + 1
    assert await health.problem() is None


async def test_an_api_server_that_is_silent_is_a_reason_not_a_crash(kube, api):
    api.intercept = None
    health = Health(Kube(ApiClient(Configuration(host="http://127.0.0.1:9"))), CONFIG)
    assert "the API server does not answer" in str(await health.problem())


async def test_a_dry_look_asks_for_every_object_of_a_run_and_keeps_none(api, kube):
    accepted = await dry_look(kube, Settings(TEMPLATES), ["ml"])
    assert sorted(api.dry_runs) == ["ConfigMap", "Job", *["Service"] * 3, *["StatefulSet"] * 3]
    assert len(accepted) == 8
    assert api.kube.objects == {}

    def refuse(request: kmock.Request) -> BaseException | None:
        return ApiException(status=403, reason="exceeded quota: gpus") if request.resource.plural == "jobs" else None

    api.intercept = refuse
    health = Health(kube, CONFIG)
    probes = Probes(health, lambda: dry_look(kube, Settings(TEMPLATES), ["ml"]))
    status, text = await probes.answer("/dry-look")
    assert status == 503
    assert "exceeded quota" in text


async def test_a_caller_that_says_nothing_holds_nothing_up(kube, monkeypatch):
    monkeypatch.setattr("services.controller.health.REQUEST_SECONDS", 0.05)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    probes = Probes(Health(kube, CONFIG), lambda: dry_look(kube, Settings(TEMPLATES), ["ml"]))
    async with probes.on(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.get("/healthz")).text == "alive\n"
            assert (await client.get("/readyz?verbose")).text == "waits for the Lease\n"
            assert (await client.get("/etc/passwd")).status_code == 404
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b"", "cut off"
        writer.close()


def test_the_chart_grants_what_is_asked_for():
    granted: dict[str, set[str]] = {}
    for resources, verbs in re.findall(r"resources: \[(.+)\]\n +verbs: \[(.+)\]", RBAC.read_text()):
        for resource in resources.split(", "):
            granted.setdefault(resource, set()).update(verbs.split(", "))
    for kind, verbs in RIGHTS.items():
        name, _, subresource = kind.partition("/")
        resource = "/".join(part for part in (RESOURCES[name].plural, subresource) if part)
        assert set(verbs) <= granted.get(resource, set()), resource


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root may start under another uid")
@pytest.mark.parametrize("uid", [10001, 1234567890])
async def test_the_process_works_under_a_uid_without_a_name_(api, tmp_path, uid):
    """As in its pod: no passwd entry, `/` as home (containerd's choice), a umask that gives nothing."""
    for name, template in TEMPLATES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(template))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {
        "namespaces": ["ml"],
        "templates": str(tmp_path),
        "leaderElection": {"lease": "controller", "namespace": "ml"},
        "healthPort": port,
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    kubeconfig = {
        "current-context": "mock",
        "contexts": [{"name": "mock", "context": {"cluster": "mock", "user": "mock"}}],
        "clusters": [{"name": "mock", "cluster": {"server": str(api.url).rstrip("/")}}],
        "users": [{"name": "mock", "user": {"token": "none"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    # May read what root's interpreter lies in, and nothing else that another uid may not.
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    command += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    command += [sys.executable, "-m", "services.controller", "--config", str(tmp_path / "config")]
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    environment = {**kept, "HOME": "/", "KUBECONFIG": str(tmp_path / "kubeconfig"), "PYTHONDONTWRITEBYTECODE": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=log, cwd="/", umask=0o077)
    try:
        api.kube.put(alignment_run(stages=[{"sft": {}}]))
        await until(lambda: process.returncode is not None or api.kube.find("Job", "demo-sft"))
        assert api.kube.find("Job", "demo-sft"), (tmp_path / "log").read_text()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.text) == (200, "leads\n")
            assert (await client.get("/dry-look")).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0, (tmp_path / "log").read_text()
    finally:
        if process.returncode is None:
            process.kill()
