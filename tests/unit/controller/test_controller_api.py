"""The real operator (kopf and the Kubernetes client over HTTP) against an API server mock with state.

Runs are looked at only because of events: the resync is far away in every test that does not need it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import kmock
import pytest
from api_server import ApiServer
from fake_kube import alignment_run, inference_service
from kubernetes.aio.client.exceptions import ApiException
from operators import Operator, until

from services.controller.model import Signals
from services.controller.release import candidate_name
from steersman.canary import Arm

TWO = [{"sft": {}}, {"rewardModel": {}}]


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server, kmock.Server(server):
        yield server


@pytest.fixture
async def operator(api: ApiServer) -> AsyncIterator[Operator]:
    async with Operator(api) as running:
        yield running


def status(api: ApiServer, name: str = "demo") -> dict[str, Any]:
    return (api.kube.find("AlignmentRun", name) or {}).get("status") or {}


def phase(api: ApiServer, name: str = "demo") -> str | None:
    return status(api, name).get("phase")


def created(api: ApiServer, kind: str) -> list[str]:
    """Names of the objects of a kind in the order of their creation."""
    return [name for verb, what, name in api.kube.writes if (verb, what) == ("create", kind)]


def reasons(api: ApiServer) -> set[str]:
    return {body["reason"] for (kind, _, _), body in api.kube.objects.items() if kind == "Event"}


@pytest.mark.parametrize("deliveries", [1, 2])
async def test_a_run_goes_through_its_stages_by_watch_events(api, operator, deliveries):
    """Also when every event is delivered twice: not one write more."""
    api.deliveries = deliveries
    api.kube.put(alignment_run(stages=TWO))
    await until(lambda: phase(api) == "Running" and api.kube.find("Job", "demo-sft"))
    api.kube.run_pod("demo-sft", '{"event": "progress", "step": 3, "total": 9, "reward": 0.5, "kl": 0.1}')
    await until(lambda: status(api)["message"] == "sft: step 3 of 9")
    assert (status(api)["reward"], status(api)["kl"]) == (0.5, 0.1)
    api.kube.finish_job("demo-sft")
    await until(lambda: api.kube.find("Job", "demo-reward-model"))
    api.kube.finish_job("demo-reward-model")
    await until(lambda: phase(api) == "Succeeded" and {"StageSucceeded", "Succeeded"} <= reasons(api))
    assert created(api, "Job") == ["demo-sft", "demo-reward-model"]
    assert created(api, "ConfigMap") == ["demo-manifest"]
    assert len(created(api, "Event")) == 6, "started, twice a stage's begin and end, succeeded"


async def test_a_failed_stage_leaves_its_reason_and_a_retry_runs_it_again(api, operator):
    api.kube.put(alignment_run(stages=TWO))
    await until(lambda: api.kube.find("Job", "demo-sft"))
    api.kube.fail_pod("demo-sft", 2, "loading\nsft: demos.jsonl:17: the row has no assistant message", final=True)
    await until(lambda: phase(api) == "Failed")
    stage = status(api)["stages"][0]
    assert (stage["reason"], stage["exitCode"]) == ("InvalidArgument", 2)
    assert "demos.jsonl:17" in status(api)["message"]
    api.kube.edit("demo", annotations={"steersman.dev/retry": "1"})
    await until(lambda: phase(api) == "Running" and created(api, "Job") == ["demo-sft", "demo-sft"])


async def test_a_failed_gate_ends_the_run_before_the_release(api, operator):
    stages = [{"evaluate": {"gates": {"reward": 0.1}}}, {"release": {"inferenceService": "chat"}}]
    endpoints = {name: {"endpoints": [f"{name}.shared:1"]} for name in ("policy", "reward", "reference")}
    service = api.kube.put(inference_service())
    api.kube.put(alignment_run(stages=stages, services=endpoints))
    await until(lambda: api.kube.find("Job", "demo-evaluate"))
    api.kube.fail_pod("demo-evaluate", 3, "evaluate: the reward gains at least 0.02, 0.1 is asked for", final=True)
    await until(lambda: phase(api) == "Failed")
    assert created(api, "Job") == ["demo-evaluate"]
    assert api.kube.find("InferenceService", "chat") == service


async def test_suspend_and_resume_by_editing_the_run(api, operator):
    api.kube.put(alignment_run(stages=TWO))
    await until(lambda: api.kube.find("Job", "demo-sft"))
    api.kube.edit("demo", suspend=True)
    await until(lambda: phase(api) == "Suspended" and not api.kube.names("Job"))
    api.kube.edit("demo", suspend=False)
    await until(lambda: phase(api) == "Running" and api.kube.names("Job") == ["demo-sft"])
    assert status(api)["observedGeneration"] == 3


async def test_two_runs_at_once_and_the_deletion_of_one(api, operator):
    api.kube.put(alignment_run("first", uid="a", stages=TWO))
    api.kube.put(alignment_run("second", uid="b", stages=TWO))
    await until(lambda: api.kube.names("Job") == ["first-sft", "second-sft"])
    await api.kube.delete("AlignmentRun", "ml", "first")
    api.kube.finish_job("second-sft")
    await until(lambda: api.kube.find("Job", "second-reward-model"))
    assert api.kube.names("Job") == ["second-reward-model", "second-sft"]
    assert api.kube.names("AlignmentRun") == ["second"]


async def test_a_node_that_is_silent_holds_no_run_up(api, operator):
    """The API server asks the kubelet for the log, and answers 500 when that is not there; the rest is known."""

    def no_log(request: kmock.Request) -> BaseException | None:
        return ApiException(status=500, reason="InternalError") if request.subresource == "log" else None

    api.intercept = no_log
    api.kube.put(alignment_run(stages=[{"sft": {}}]))
    await until(lambda: api.kube.find("Job", "demo-sft"))
    api.kube.run_pod("demo-sft", "")
    await until(lambda: status(api).get("message") == "sft: starting")
    api.kube.edit("demo", suspend=True)
    await until(lambda: phase(api) == "Suspended")


async def test_the_operator_restarts_between_acting_and_writing_the_status(api):
    """The Job is made, the status is not: the next process finds the Job and makes no second one."""

    def no_status(request: kmock.Request) -> BaseException | None:
        refused = request.subresource == "status" and request.action == kmock.action.UPDATE
        return ApiException(status=500, reason="InternalError") if refused else None

    api.intercept = no_status
    async with Operator(api):
        api.kube.put(alignment_run(stages=[{"sft": {}}]))
        await until(lambda: api.kube.find("Job", "demo-sft"))
    assert status(api) == {}
    api.intercept = None
    api.kube.finish_job("demo-sft")
    async with Operator(api):
        await until(lambda: phase(api) == "Succeeded")
    assert created(api, "Job") == ["demo-sft"]


@pytest.mark.parametrize("gone", [True, False], ids=["410-gone", "cut"])
async def test_a_watch_that_breaks_is_opened_again(api, operator, gone):
    """What happened while no watch was open is not missed."""
    api.kube.put(alignment_run(stages=TWO))
    await until(lambda: api.kube.find("Job", "demo-sft") and phase(api) == "Running")
    before = api.watches_opened
    api.break_watches(gone=gone)
    api.kube.finish_job("demo-sft")
    await until(lambda: api.kube.find("Job", "demo-reward-model"))
    assert api.watches_opened > before


async def test_a_status_against_a_stale_version_is_decided_anew(api, operator):
    """Somebody suspends the run between the controller's look and its writing: the edit stands and is obeyed."""
    edits: list[str] = []

    def edit_first(request: kmock.Request) -> None:
        if request.subresource == "status" and not edits:
            edits.append(request.name)
            api.kube.edit("demo", suspend=True)

    api.intercept = edit_first
    api.kube.put(alignment_run(stages=TWO))
    await until(lambda: phase(api) == "Suspended" and not api.kube.names("Job"))
    assert edits == ["demo"]
    assert api.kube.find("AlignmentRun", "demo")["spec"]["suspend"] is True
    assert status(api)["observedGeneration"] == 2


async def test_a_conflicting_edit_of_the_inference_service_is_kept(api):
    """A person scales the bot while the controller publishes the model: both changes are there in the end."""
    edits: list[str] = []

    def edit_first(request: kmock.Request) -> None:
        if request.action == kmock.action.UPDATE and request.resource.plural == "inferenceservices" and not edits:
            edits.append(request.name)
            service = api.kube.find("InferenceService", "chat")
            service["spec"]["predictor"]["minReplicas"] = 7
            api.kube._touch(service)

    api.intercept = edit_first
    api.kube.put(inference_service())
    api.kube.put(alignment_run(stages=[{"release": {"inferenceService": "chat"}}]))
    async with Operator(api):
        await until(lambda: api.kube.find("Job", "demo-release"))
        api.kube.finish_job("demo-release")
        await until(lambda: phase(api) == "Succeeded")
    predictor = api.kube.find("InferenceService", "chat")["spec"]["predictor"]
    assert edits == ["chat"]
    assert predictor["minReplicas"] == 7
    assert predictor["model"]["storageUri"].endswith("/demo/release/model")


class Live:
    """Live signals of a candidate that fails too often."""

    async def read(self, *_: Any) -> Signals:
        good = Arm(judged=40, bad=4, requests=500)
        return Signals(good, good.model_copy(update={"errors": 40}))


async def test_a_bad_canary_is_rolled_back(api):
    """Signals come without events: the resync looks at them."""
    api.kube.put(inference_service())
    api.kube.put(alignment_run(stages=[{"release": {"inferenceService": "chat", "canary": {"steps": [10, 100]}}}]))
    candidate = candidate_name(api.kube.find("AlignmentRun", "demo"))
    async with Operator(api, signals=Live(), resync=0.2):
        await until(lambda: api.kube.find("Job", "demo-release"))
        api.kube.finish_job("demo-release")
        await until(lambda: api.kube.find("InferenceService", "chat")["spec"]["canary"][0]["trafficPercent"] == 10)
        ready = [{"name": candidate, "ready": True, "trafficPercent": 10}]
        api.kube.set_status("InferenceService", "chat", {"canaryStatuses": ready})
        await until(lambda: phase(api) == "RolledBack")
    spec = api.kube.find("InferenceService", "chat")["spec"]
    assert "canary" not in spec
    assert spec["predictor"]["model"]["storageUri"] == "pvc://steersman-artifacts/old"
    assert status(api)["release"]["reason"] == (
        "at 10%: 8.0% of the requests failed, more than 2.0% and than the champion's 0.0%"
    )
    assert not api.kube.find("AlignmentRun", "demo")["metadata"].get("finalizers")


async def test_an_api_server_that_refuses_is_explained_and_asked_again(api, operator):
    refusals = [ApiException(status=403, reason="exceeded quota")]

    def refuse(request: kmock.Request) -> BaseException | None:
        making = request.action == kmock.action.CREATE and request.resource.plural == "jobs"
        return refusals.pop() if making and refusals else None

    api.intercept = refuse
    api.kube.put(alignment_run(stages=TWO))
    await until(lambda: "exceeded quota" in status(api)["message"])
    await until(lambda: api.kube.find("Job", "demo-sft"))
