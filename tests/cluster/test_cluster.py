"""On a real API server: `make test-cluster` with a kubeconfig.

Everywhere: admission, schema, CEL, RBAC by impersonation, the controller's reactions with the status of Jobs set by the
test, upgrade, uninstall. Where pods run: the installation gets ready, `helm test` passes, a tiny run is released.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.cluster

QUICKSTART = Path(__file__).resolve().parents[2] / "examples/01-quickstart/run.yaml"
TINY = {
    "data": {"demo": {"demonstrations": 24, "preferences": 24, "prompts": 24, "heldoutPrompts": 12}},
    "stages": [{"sft": {"maxSteps": 2}}, {"rewardModel": {"maxSteps": 2}}, {"rl": {"steps": 1}}, {"release": {}}],
    "trainer": {"resources": {"cpu": "500m", "memory": "3Gi"}},
}


def manifest(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": name},
        "spec": {"data": {"demo": {}}, "stages": [{"sft": {}}, {"evaluate": {}}], **spec},
    }


def apply(lab, document: dict[str, Any], check: bool = True):
    return lab.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(document), check=check)


def get(lab, kind: str, name: str) -> dict[str, Any]:
    done = lab.kubectl("get", kind, name, "-o", "json", "--ignore-not-found")
    return json.loads(done.stdout) if done.stdout.strip() else {}


def until(what: Callable[[], Any], seconds: float, why: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.5)
    raise AssertionError(why)


@pytest.fixture(scope="module")
def installed(lab):
    lab.install()
    until(
        lambda: "True" in lab.kubectl(
            "get", "crd", "alignmentruns.steersman.dev", "-o",
            "jsonpath={.status.conditions[?(@.type=='Established')].status}", check=False, namespaced=False,
        ).stdout,
        60,
        "the CRD was not established",
    )  # fmt: skip
    return lab


def test_the_crd_is_structural_for_the_api_server(installed):
    text = installed.kubectl("get", "crd", "alignmentruns.steersman.dev", "-o", "json", namespaced=False).stdout
    conditions = {item["type"]: item for item in json.loads(text)["status"]["conditions"]}
    assert conditions.get("NonStructuralSchema", {}).get("status") != "True"
    assert conditions["Established"]["status"] == "True"


def test_the_quickstart_is_admitted(installed):
    done = installed.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(QUICKSTART))
    assert "created" in done.stdout


def test_a_stage_without_options_is_admitted(installed):
    """`- evaluate:` is a null, which CEL takes for an absent field."""
    document = manifest("empty", stages=[{"sft": None}, {"evaluate": None}])
    installed.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"stages": [{"sft": {}, "rl": {}}]}, "exactly one key"),
        ({"stages": [{}]}, "at least 1 properties"),
        ({"stages": [{"sft": None, "rl": {}}]}, "at most 1"),
        ({"stages": [{"sft": {"epochs": 0}}]}, "epochs"),
        ({"stages": [{"release": {"canary": {}}}]}, "inferenceService"),
        ({"stages": []}, "stages"),
        ({"sede": 1}, "sede"),
    ],
)
def test_wrong_manifests_are_refused(installed, spec, words):
    done = installed.kubectl(
        "apply",
        "--dry-run=server",
        "--validate=strict",
        "-f",
        "-",
        stdin=yaml.safe_dump(manifest("wrong", **spec)),
        check=False,
    )
    assert done.returncode != 0
    assert words in done.stderr


def test_what_decides_the_result_cannot_be_changed(installed):
    apply(installed, manifest("fixed", suspend=True))
    done = apply(installed, manifest("fixed", suspend=True, seed=99), check=False)
    assert "spec.seed decides the result" in done.stderr
    apply(installed, manifest("fixed", suspend=True, ttlSecondsAfterFinished=60))
    installed.kubectl("delete", "alignmentrun", "fixed", "--wait=false")


def test_rights_are_the_least(installed):
    for verb, resource in (
        ("create", "jobs.batch"),
        ("patch", "alignmentruns.steersman.dev/status"),
        ("create", "statefulsets.apps"),
        ("get", "pods/log"),
        ("list", "pods"),
    ):
        assert installed.can("controller", verb, resource), f"the controller must {verb} {resource}"
    for verb, resource in (
        ("get", "secrets"),
        ("delete", "pods"),
        ("create", "pods/exec"),
        ("update", "roles.rbac.authorization.k8s.io"),
        ("delete", "persistentvolumeclaims"),
    ):
        assert not installed.can("controller", verb, resource), f"the controller must not {verb} {resource}"
    for who in ("policy", "reward", "reference", "gateway", "trainer"):
        for verb, resource in (("get", "pods"), ("get", "secrets"), ("list", "alignmentruns.steersman.dev")):
            assert not installed.can(who, verb, resource), f"{who} must not {verb} {resource}"


def test_an_upgrade_keeps_runs(installed):
    apply(installed, manifest("kept", suspend=True))
    installed.install("--set", "gateway.drainSeconds=31")
    assert get(installed, "alignmentrun", "kept")["metadata"]["name"] == "kept"
    config = get(installed, "configmap", f"{installed.release}-steersman-gateway")["data"]["config.yaml"]
    assert yaml.safe_load(config)["drainSeconds"] == 31
    installed.kubectl("delete", "alignmentrun", "kept", "--wait=false")


class LocalController:
    """The controller of this checkout against the API server, with the chart's templates and the test's rights."""

    def __init__(self, lab, folder: Path) -> None:
        data = get(lab, "configmap", f"{lab.release}-steersman-controller")["data"]
        for name, text in data.items():
            (folder / name).write_text(text)
        self._folder = folder
        self._config = yaml.safe_load(data["config.yaml"])

    async def run(self, seconds: float, done: Callable[[], bool]) -> None:
        from services.controller.config import ControllerConfig
        from services.controller.operator import serve

        document = {**self._config, "templates": str(self._folder), "resyncSeconds": 2}
        for key in ("leaderElection", "metricsPort", "healthPort"):
            document.pop(key, None)
        config = ControllerConfig.model_validate(document, by_alias=True, by_name=False)
        task = asyncio.create_task(serve(config))
        try:
            for _ in range(int(seconds / 0.5)):
                if await asyncio.to_thread(done) or task.done():
                    break
                await asyncio.sleep(0.5)
            assert not task.done() or task.exception() is None, task.exception()
            assert await asyncio.to_thread(done), "the state was not reached"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def set_job(lab, name: str, condition: str, **fields: Any) -> None:
    """Ends a Job as the Job controller would; a real one needs the time fields and the condition before it."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    before = {"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[condition]
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": now, "lastProbeTime": now, "reason": "Test"}
        for kind in (before, condition)
    ]
    times = {"startTime": now, **({"completionTime": now} if condition == "Complete" else {})}
    body = {"status": {"conditions": conditions, **times, **fields}}
    lab.kubectl("patch", "job", name, "--subresource=status", "--type=merge", "-p", json.dumps(body))


async def test_the_controller_reacts_to_jobs_without_kubelets(installed, tmp_path):
    """The controller's own decisions on a real API server; what pods would do, the test does."""
    if installed.full:
        pytest.skip("pods run here: the release test shows the same with real ones")
    apply(installed, manifest("react", stages=[{"sft": {}}, {"rewardModel": {}}]))
    controller = LocalController(installed, tmp_path)
    await controller.run(60, lambda: bool(get(installed, "job", "react-sft")))
    job = get(installed, "job", "react-sft")
    assert job["metadata"]["ownerReferences"][0]["kind"] == "AlignmentRun"
    set_job(installed, "react-sft", "Complete", succeeded=1)
    await controller.run(60, lambda: bool(get(installed, "job", "react-reward-model")))
    set_job(installed, "react-reward-model", "Failed", failed=1)
    await controller.run(60, lambda: get(installed, "alignmentrun", "react")["status"]["phase"] == "Failed")
    run = get(installed, "alignmentrun", "react")
    assert [stage["phase"] for stage in run["status"]["stages"]] == ["Succeeded", "Failed"]
    assert run["status"]["observedGeneration"] == run["metadata"]["generation"]
    listed = installed.kubectl("get", "alignmentrun", "react").stdout
    assert "reward-model" in listed
    assert "Failed" in listed
    events = installed.kubectl("get", "events", "--field-selector", "involvedObject.name=react", "-o", "name").stdout
    assert events.strip()
    installed.kubectl("delete", "alignmentrun", "react")


def test_a_tiny_run_is_released(installed):
    """Pods run: everything is ready, `helm test` passes, the run goes from demo data to a released model."""
    if not installed.full:
        pytest.skip("no kubelet: pods do not run in this cluster")
    installed.helm("test", installed.release, "--timeout", "10m")
    apply(installed, {**manifest("tiny"), "spec": TINY})
    ended = until(
        lambda: get(installed, "alignmentrun", "tiny").get("status", {}).get("phase") in ("Succeeded", "Failed"),
        3600,
        "the run did not end in an hour",
    )
    status = get(installed, "alignmentrun", "tiny")["status"]
    assert ended
    assert status["phase"] == "Succeeded", json.dumps(status, indent=2)
    for service in ("policy", "reward", "reference"):
        assert get(installed, "statefulset", f"tiny-{service}")["spec"]["replicas"] == 0


def test_uninstalling_removes_everything(installed):
    """Last: the release goes, and with `keep` off the CRD and the volumes as well."""
    installed.helm("uninstall", installed.release, "--wait")
    kinds = "deployments,services,configmaps,serviceaccounts,networkpolicies,roles,rolebindings,persistentvolumeclaims"
    selector = f"app.kubernetes.io/instance={installed.release}"
    left = installed.kubectl("get", kinds, "-l", selector, "-o", "name").stdout.split()
    assert [name for name in left if not name.endswith("-database")] == [], (
        "the database stays until it is deleted by hand"
    )
    gone = installed.kubectl("get", "crd", "alignmentruns.steersman.dev", check=False, namespaced=False)
    assert gone.returncode != 0
