"""The real operator (kopf and the Kubernetes client over HTTP) against an API server mock with state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kmock as mock
import kopf
import pytest
import yaml
from fake_kube import TEMPLATES, alignment_run
from kubernetes.aio.client import ApiClient, Configuration

from services.controller.config import ControllerConfig
from services.controller.kube import Kube
from services.controller.model import Settings
from services.controller.operator import build_registry
from services.controller.reconcile import Reconciler

RUNS = mock.resource("steersman.dev", "v1alpha1", "alignmentruns")
JOBS = mock.resource("batch", "v1", "jobs")
SETS = mock.resource("apps", "v1", "statefulsets")
KINDS = {
    RUNS: ("AlignmentRun", {"status"}),
    JOBS: ("Job", {"status"}),
    SETS: ("StatefulSet", {"status", "scale"}),
    mock.resource("", "v1", "pods"): ("Pod", {"status", "log"}),
    mock.resource("", "v1", "events"): ("Event", set()),
    mock.resource("", "v1", "services"): ("Service", set()),
    mock.resource("", "v1", "configmaps"): ("ConfigMap", set()),
}
VERBS = {"get", "list", "watch", "create", "patch", "delete"}


@pytest.fixture
async def api(kmock):
    for resource, (kind, subresources) in KINDS.items():
        kmock.resources[resource] = {"kind": kind, "namespaced": True, "verbs": VERBS, "subresources": subresources}
    return kmock


class Operator:
    """The controller as a process would run it, in this event loop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._stop = asyncio.Event()
        ready = asyncio.Event()
        self._task = asyncio.create_task(self._work(ready))
        await asyncio.wait_for(ready.wait(), 20)

    async def _work(self, ready: asyncio.Event) -> None:
        config = ControllerConfig(namespaces=["ml"], resync_seconds=0.5)
        async with ApiClient(Configuration(host=self._url)) as client:
            kube = Kube(client)
            registry = build_registry(kube, Reconciler(kube, Settings(TEMPLATES)), config)

            @kopf.on.login(registry=registry)
            def login(**_: Any) -> kopf.ConnectionInfo:
                return kopf.ConnectionInfo(server=self._url)

            @kopf.on.startup(registry=registry)
            def fast(settings: kopf.OperatorSettings, **_: Any) -> None:
                settings.watching.reconnect_backoff = 0.05
                settings.networking.error_backoffs = [0.05] * 20

            await kopf.operator(
                registry=registry, namespaces=["ml"], standalone=True, stop_flag=self._stop, ready_flag=ready
            )

    async def stop(self) -> None:
        self._stop.set()
        assert self._task is not None
        await asyncio.wait_for(self._task, 20)


@pytest.fixture
async def operator(api):
    found = Operator(str(api.url).rstrip("/"))
    await found.start()
    yield found
    await found.stop()


async def until(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Waits for a state of the API server; no test depends on how long that takes."""
    for _ in range(int(seconds / 0.05)):
        try:
            if found := what():
                return found
        except KeyError:
            pass
        await asyncio.sleep(0.05)
    raise AssertionError("the state was not reached")


def status(api: Any, name: str = "demo") -> dict[str, Any]:
    return api.objects[RUNS, "ml", name].raw.get("status") or {}


def job_names(api: Any) -> set[str]:
    return {name for (resource, _, name), body in api.objects.items() if resource == JOBS and not body.deleted}


async def send(api: Any, method: str, path: str, body: dict[str, Any]) -> None:
    import aiohttp

    async with aiohttp.ClientSession(base_url=str(api.url)) as session:
        answer = await session.request(method, path, json=body)
        assert answer.status < 300, await answer.text()


async def create(api: Any, run: dict[str, Any]) -> None:
    await send(api, "POST", "/apis/steersman.dev/v1alpha1/namespaces/ml/alignmentruns", run)


async def finish(api: Any, job: str) -> None:
    done = {"status": {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}}
    await send(api, "PATCH", f"/apis/batch/v1/namespaces/ml/jobs/{job}/status", done)


async def test_a_run_goes_through_its_stages_by_watch_events(api, operator):
    await create(api, alignment_run(stages=[{"sft": {}}, {"rewardModel": {}}]))
    await until(lambda: "demo-sft" in job_names(api))
    await until(lambda: status(api)["phase"] == "Running")
    await finish(api, "demo-sft")
    await until(lambda: "demo-reward-model" in job_names(api))
    await finish(api, "demo-reward-model")
    await until(lambda: status(api)["phase"] == "Succeeded")
    manifest = api.objects[mock.resource("", "v1", "configmaps"), "ml", "demo-manifest"].raw
    assert yaml.safe_load(manifest["data"]["manifest.yaml"])["kind"] == "AlignmentRun"
    reasons = {body.raw["reason"] for (resource, _, _), body in api.objects.items() if resource.plural == "events"}
    assert {"Started", "StageStarted", "StageSucceeded", "Succeeded"} <= reasons


async def test_the_operator_restarts_in_the_middle(api):
    first = Operator(str(api.url).rstrip("/"))
    await first.start()
    await create(api, alignment_run(stages=[{"sft": {}}]))
    await until(lambda: "demo-sft" in job_names(api))
    await first.stop()
    await finish(api, "demo-sft")
    second = Operator(str(api.url).rstrip("/"))
    await second.start()
    await until(lambda: status(api)["phase"] == "Succeeded")
    await second.stop()
    created = [request for request in api[mock.CREATE] if request.resource == JOBS]
    assert len(created) == 1


async def test_a_watch_that_breaks_is_opened_again(api, operator):
    """Every open watch ends with 410 Gone, as after a compaction; the operator lists and watches anew."""
    await create(api, alignment_run(stages=[{"sft": {}}, {"rewardModel": {}}]))
    await until(lambda: "demo-sft" in job_names(api))
    before = len(api[mock.WATCH])
    gone = {"kind": "Status", "apiVersion": "v1", "code": 410, "status": "Failure", "reason": "Expired"}
    for resource in KINDS:
        await api._buses[resource].put({"type": "ERROR", "object": gone})
    await until(lambda: len(api[mock.WATCH]) > before)
    await finish(api, "demo-sft")
    await until(lambda: "demo-reward-model" in job_names(api))


async def test_a_stale_resource_version_makes_it_look_again(api, operator):
    """The first write of the status meets a newer version; nothing is lost and nothing is done twice."""
    refused = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 409, "reason": "Conflict"}
    path = "/apis/steersman.dev/v1alpha1/namespaces/ml/alignmentruns/demo/status"
    stale = api[f"patch {path}"][:1] << mock.Response(status=409, payload=refused)
    await create(api, alignment_run(stages=[{"sft": {}}]))
    await until(lambda: len(api[f"patch {path}"]) > 1)
    await finish(api, "demo-sft")
    await until(lambda: status(api)["phase"] == "Succeeded")
    assert len(stale) == 1
    assert len([request for request in api[mock.CREATE] if request.resource == JOBS]) == 1


async def test_two_runs_and_the_deletion_of_one(api, operator):
    await create(api, alignment_run("first", uid="a", stages=[{"sft": {}}]))
    await create(api, alignment_run("second", uid="b", stages=[{"sft": {}}]))
    await until(lambda: job_names(api) >= {"first-sft", "second-sft"})
    await send(api, "DELETE", "/apis/steersman.dev/v1alpha1/namespaces/ml/alignmentruns/first", {})
    await finish(api, "second-sft")
    await until(lambda: status(api, "second")["phase"] == "Succeeded")


async def test_suspend_and_resume_by_editing_the_run(api, operator):
    await create(api, alignment_run(stages=[{"sft": {}}]))
    await until(lambda: "demo-sft" in job_names(api))
    path = "/apis/steersman.dev/v1alpha1/namespaces/ml/alignmentruns/demo"
    await send(api, "PATCH", path, {"spec": {"suspend": True}})
    await until(lambda: status(api)["phase"] == "Suspended" and not job_names(api))
    await send(api, "PATCH", path, {"spec": {"suspend": False}})
    await until(lambda: "demo-sft" in job_names(api))


def test_templates_are_read_from_the_charts_folder(tmp_path: Path):
    from services.controller.config import load_templates
    from steersman.errors import ConfigError

    for name, template in TEMPLATES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(template))
    assert load_templates(tmp_path) == TEMPLATES
    (tmp_path / "policy.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="not a pod template"):
        load_templates(tmp_path)
    (tmp_path / "policy.yaml").unlink()
    with pytest.raises(ConfigError, match=r"policy\.yaml cannot be read"):
        load_templates(tmp_path)
