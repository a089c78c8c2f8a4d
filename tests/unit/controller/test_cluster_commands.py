"""`steersman submit|status|logs|cancel` with a kubeconfig, against the API server mock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import kmock
import pytest
import yaml
from api_server import ApiServer
from fake_kube import alignment_run
from typer.testing import CliRunner

from steersman.cli import app as whole
from steersman.cli.cluster import app


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server, kmock.Server(server):
        yield server


@pytest.fixture
def steersman(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., asyncio.Future[Any]]:
    """Runs a command in a thread, beside the server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "lab",
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "me", "namespace": "ml"}}],
        "clusters": [{"name": "lab", "cluster": {"server": str(api.url).rstrip("/")}}],
        "users": [{"name": "me", "user": {}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    return lambda *arguments: asyncio.to_thread(CliRunner().invoke, app, [str(item) for item in arguments])


def write(folder: Path, **spec: object) -> Path:
    run = alignment_run(**spec)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**run, "metadata": {"name": "demo"}}))
    return path


async def test_a_manifest_is_submitted_and_what_may_change_is_changed(api, steersman, tmp_path):
    done = await steersman("submit", "-f", write(tmp_path))
    assert (done.exit_code, done.output) == (0, "demo: submitted to ml\n")
    assert api.kube.find("AlignmentRun", "demo")["spec"]["stages"][0] == {"sft": {}}
    done = await steersman("submit", "-f", write(tmp_path), "--set", "spec.suspend=true")
    assert done.exit_code == 0, done.output
    assert api.kube.find("AlignmentRun", "demo")["spec"]["suspend"] is True


async def test_a_null_of_the_manifest_stays_also_when_it_is_submitted_again(api, steersman, tmp_path):
    """`lora: null` asks for full weights."""
    full = [{"sft": {"lora": None}}]
    for change in ((), ("--set", "spec.suspend=true")):
        done = await steersman("submit", "-f", write(tmp_path, stages=full), *change)
        assert done.exit_code == 0, done.output
        assert api.kube.find("AlignmentRun", "demo")["spec"]["stages"] == full


async def test_status_shows_all_runs_or_one_with_the_reason_of_its_failure(api, steersman):
    run = api.kube.put(alignment_run())
    run["status"] = {
        "phase": "Failed",
        "stage": "rl",
        "step": 3,
        "totalSteps": 9,
        "reward": 0.51234,
        "message": "rl: the loss is not a number",
        "stages": [
            {"name": "sft", "phase": "Succeeded"},
            {"name": "rl", "phase": "Failed", "reason": "FailedPrecondition", "attempts": 1, "log": "step 3\nbroken"},
        ],
    }
    assert (await steersman("status")).output == "demo  Failed  rl 3/9  reward 0.512  rl: the loss is not a number\n"
    told = (await steersman("status", "demo")).output
    assert "FailedPrecondition, 1 failed pods" in told
    assert told.endswith("step 3\nbroken\n")


async def test_logs_come_from_the_pod_or_from_what_the_status_kept(api, steersman):
    run = api.kube.put(alignment_run())
    run["status"] = {"stage": "sft", "stages": [{"name": "sft", "phase": "Failed", "log": "the end"}]}
    assert (await steersman("logs", "demo")).output == "the end\n"
    labels = {"steersman.dev/run": "demo", "steersman.dev/stage": "sft"}
    made = "2026-01-01T00:00:00Z"
    pod = {"name": "demo-sft-x", "namespace": "ml", "labels": labels, "creationTimestamp": made}
    api.kube.put({"kind": "Pod", "metadata": pod, "spec": {"containers": []}, "status": {"phase": "Running"}})
    api.kube.logs["demo-sft-x"] = "one\ntwo\nthree"
    done = await steersman("logs", "demo", "--lines", 2)
    assert done.output == "two\nthree\n", done.exception


async def test_logs_are_those_of_prepare_until_the_stage_begins(api, steersman):
    """The API server refuses to show a container that waits for the one before it."""
    api.kube.put(alignment_run())["status"] = {"stage": "sft"}
    asked: list[str] = []

    def note(request: kmock.Request) -> None:
        if request.subresource == "log":
            asked.append(request.params.get("container", ""))

    api.intercept = note
    labels = {"steersman.dev/run": "demo", "steersman.dev/stage": "sft"}
    meta = {"name": "p", "namespace": "ml", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}
    status = {"restartCount": 0, "ready": False, "image": "i", "imageID": "i"}
    running, waits = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, {"waiting": {"reason": "PodInitializing"}}
    for preparing, working in ((running, waits), ({"terminated": {"exitCode": 0}}, running)):
        api.kube.put(
            {
                "kind": "Pod",
                "metadata": dict(meta),
                "spec": {"containers": []},
                "status": {
                    "phase": "Pending",
                    "initContainerStatuses": [{"name": "prepare", "state": preparing, **status}],
                    "containerStatuses": [{"name": "trainer", "state": working, **status}],
                },
            }
        )
        assert (await steersman("logs", "demo")).exit_code == 0
    assert asked == ["prepare", "trainer"]


async def test_status_says_what_holds_a_run_up_and_what_a_canary_has_shown(api, steersman):
    run = api.kube.put(alignment_run())
    held = {
        "type": "Progressing",
        "status": "False",
        "reason": "ImagePullBackOff",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    arm = {"judged": 40, "bad": 3, "requests": 900, "errors": 2, "timed": 898, "slow": 11}
    run["status"] = {
        "phase": "Running",
        "stage": "rl",
        "message": "rl: policy: ImagePullBackOff: no such image",
        "conditions": [held],
        "release": {"candidate": "c1", "model": "m", "percent": 10, "evidence": {"candidate": arm}},
    }
    told = (await steersman("status", "demo")).output
    assert "held up since 2026-01-01T00:00:00Z: ImagePullBackOff" in told
    assert "candidate 900 requests, 2 failed, 11 slow; 40 judged, 3 with a thumb down" in told


async def test_cancel_asks_the_controller(api, steersman):
    api.kube.put(alignment_run())
    assert (await steersman("cancel", "demo")).output == "demo: asked to stop\n"
    assert api.kube.find("AlignmentRun", "demo")["metadata"]["annotations"] == {"steersman.dev/cancel": "true"}


async def test_a_run_that_is_not_there_is_a_sentence(steersman):
    done = await steersman("cancel", "nobody")
    assert type(done.exception).__name__ == "NotFoundError"
    assert "run nobody: " in str(done.exception)


async def test_the_doctor_says_what_a_cluster_has_and_lacks(api, steersman):
    version = {"groupVersion": "v1", "version": "v1"}
    groups = [{"name": name, "versions": [version]} for name in ("steersman.dev", "serving.kserve.io")]
    api["/apis/"] << {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    done = await asyncio.to_thread(CliRunner().invoke, whole, ["doctor", "--cluster", "--json"])
    assert done.exit_code == 0, done.output
    found = {item["name"]: item for item in json.loads(done.output)["findings"]}
    assert found["API server"]["found"] == "answers; namespace ml"
    assert found["AlignmentRun"]["state"] == "ok"
    assert found["runs"]["found"] == "you may read runs"
    assert found["KServe"]["state"] == "ok"
    assert found["Kueue"] == {"name": "Kueue", "state": "note", "found": "not installed: no queues", "mend": ""}


async def test_the_doctor_says_why_it_reaches_no_cluster(api, steersman, tmp_path):
    (tmp_path / "config").write_text(
        yaml.safe_dump({**yaml.safe_load((tmp_path / "config").read_text()), "clusters": []})
    )
    done = await asyncio.to_thread(CliRunner().invoke, whole, ["doctor", "--cluster"])
    assert done.exit_code == 1
    assert "✗ API server" in done.output
