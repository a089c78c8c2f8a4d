"""On a real API server: `make test-cluster` with a kubeconfig.

Everywhere: admission, schema, CEL, printer columns, RBAC by impersonation, upgrade. Where pods run: the installation
gets ready, `helm test` passes, a tiny run is released.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
import yaml
from cluster_lab import run_of, until

from services.controller import objects
from services.controller.model import Settings
from services.controller.plan import parse_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(5400)]

QUICKSTART = Path(__file__).resolve().parents[2] / "examples/01-quickstart/run.yaml"
SERVICES = ("policy", "reward", "reference")
TINY = {
    "data": {"demo": {"demonstrations": 24, "preferences": 24, "prompts": 24, "heldoutPrompts": 12}},
    "stages": [{"sft": {"maxSteps": 2}}, {"rewardModel": {"maxSteps": 2}}, {"rl": {"steps": 1}}, {"release": {}}],
    "trainer": {"resources": {"cpu": "500m", "memory": "3Gi"}},
}


def test_the_crd_is_structural_for_the_api_server(installed):
    text = installed.kubectl("get", "crd", "alignmentruns.steersman.dev", "-o", "json", namespaced=False).stdout
    conditions = {item["type"]: item for item in json.loads(text)["status"]["conditions"]}
    assert conditions.get("NonStructuralSchema", {}).get("status") != "True"
    assert conditions["Established"]["status"] == "True"


def test_the_quickstart_is_admitted(installed):
    done = installed.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(QUICKSTART))
    assert "created" in done.stdout


def test_a_stage_without_options_is_admitted(installed):
    """`- evaluate:` is a null, which CEL takes for an absent field and `kubectl apply` leaves out by itself."""
    document = run_of("empty", stages=[{"sft": None}, {"evaluate": None}])
    installed.apply(document, "--server-side", "--dry-run=server")
    done = installed.apply(document, "--dry-run=server", check=False)
    assert "should have at least 1 properties" in done.stderr


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"stages": [{"sft": {}, "rl": {}}]}, "at most 1"),
        ({"stages": [{}]}, "at least 1 properties"),
        ({"stages": [{"sft": None, "rl": {}}]}, "at most 1"),
        ({"stages": [{"sft": {"epochs": 0}}]}, "epochs"),
        ({"stages": [{"release": {"canary": {}}}]}, "inferenceService"),
        ({"stages": []}, "stages"),
        ({"sede": 1}, "sede"),
    ],
)
def test_wrong_manifests_are_refused(installed, spec, words):
    text = yaml.safe_dump(run_of("wrong", **spec))
    options = ("--dry-run=server", "--validate=strict", "-f", "-")
    done = installed.kubectl("create", *options, stdin=text, check=False)
    assert done.returncode != 0
    assert words in done.stderr


def test_what_decides_the_result_cannot_be_changed(installed):
    installed.apply(run_of("fixed", suspend=True))
    done = installed.apply(run_of("fixed", suspend=True, seed=99), check=False)
    assert "spec.seed decides the result" in done.stderr
    installed.apply(run_of("fixed", suspend=True, ttlSecondsAfterFinished=60))
    installed.kubectl("delete", "alignmentrun", "fixed", "--wait=false")


def test_a_status_is_admitted_and_shown_in_columns(installed):
    if installed.full:
        pytest.skip("pods run here: the controller itself writes the status")
    installed.apply(run_of("shown", suspend=True))
    stages = [{"name": "sft", "phase": "Succeeded", "attempts": 0}]
    status = {
        "phase": "Running",
        "stage": "rl",
        "step": 3,
        "totalSteps": 9,
        "reward": 0.5,
        "kl": 0.25,
        "stages": stages,
    }
    installed.set_status("alignmentrun", "shown", status)
    head, row = installed.kubectl("get", "arun", "shown").stdout.splitlines()
    assert head.split() == ["NAME", "PHASE", "STAGE", "STEP", "REWARD", "KL", "AGE"]
    assert row.split()[:-1] == ["shown", "Running", "rl", "3", "0.5", "0.25"]
    wide = installed.kubectl("get", "arun", "shown", "-o", "wide").stdout.splitlines()
    assert wide[0].split() == ["NAME", "PHASE", "STAGE", "STEP", "STEPS", "REWARD", "KL", "TRAFFIC", "MESSAGE", "AGE"]
    run = installed.get("alignmentrun", "shown")
    assert (run["metadata"]["generation"], run["status"]["stages"]) == (1, stages)
    with pytest.raises(AssertionError, match="Unsupported value"):
        installed.set_status("alignmentrun", "shown", {"phase": "Perhaps"})
    installed.patch("alignmentrun", "shown", {"status": {"phase": "Succeeded"}})  # not by the status subresource
    assert installed.get("alignmentrun", "shown")["status"]["phase"] == "Running"
    installed.kubectl("delete", "alignmentrun", "shown", "--wait=false")


def test_every_pod_of_the_chart_is_admitted(installed):
    """A Deployment is admitted with any pod; only the pod itself meets Pod Security and the other admission."""
    selector = f"app.kubernetes.io/instance={installed.release}"
    templates = {item["metadata"]["name"]: item["spec"]["template"] for item in installed.list("deployments", selector)}
    data = installed.get("configmap", f"{installed.release}-steersman-controller")["data"]
    templates |= {f"run-{name}": yaml.safe_load(data[f"{name}.yaml"]) for name in ("trainer", *SERVICES)}
    assert {name.rpartition("-")[2] for name in templates} == {"controller", "gateway", "trainer", *SERVICES}
    for name, template in templates.items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**template["metadata"], "name": f"{name}-dry"}
        done = installed.apply(pod, "--dry-run=server", "--validate=strict")
        assert "created" in done.stdout


def test_what_the_controller_asks_of_kueue_is_admitted(installed):
    """Where its CRD is; Kueue itself need not run."""
    if "workloads.kueue.x-k8s.io" not in installed.kubectl("get", "crd", "-o", "name", namespaced=False).stdout:
        pytest.skip("no Kueue: the CRD workloads.kueue.x-k8s.io is not here")
    run = run_of("queued", stages=[{"sft": {}}, {"rewardModel": {}}, {"rl": {"steps": 2}}], trainer={"queue": "gpus"})
    run["metadata"] |= {"namespace": installed.namespace, "uid": str(uuid.uuid4())}
    config = installed.get("configmap", f"{installed.release}-steersman-controller")["data"]
    names = ("trainer", "policy", "reward", "reference")
    settings = Settings({name: yaml.safe_load(config[f"{name}.yaml"]) for name in names})
    installed.apply(objects.workload(run, parse_run(run), 2, settings), "--server-side", "--dry-run=server")


def test_rights_are_the_least(installed):
    for verb, resource in (
        ("create", "jobs.batch"),
        ("patch", "alignmentruns.steersman.dev/status"),
        ("create", "statefulsets.apps"),
        ("get", "pods/log"),
        ("list", "pods"),
        ("create", "leases.coordination.k8s.io"),
        ("update", f"leases.coordination.k8s.io:{installed.release}-steersman-controller"),
    ):
        assert installed.can("controller", verb, resource), f"the controller must {verb} {resource}"
    for verb, resource in (
        ("get", "secrets"),
        ("delete", "pods"),
        ("create", "pods/exec"),
        ("update", "roles.rbac.authorization.k8s.io"),
        ("delete", "persistentvolumeclaims"),
        ("update", "leases.coordination.k8s.io:another"),
        ("patch", "alignmentruns.steersman.dev/scale"),
    ):
        assert not installed.can("controller", verb, resource), f"the controller must not {verb} {resource}"
    for who in ("policy", "reward", "reference", "gateway", "trainer"):
        for verb, resource in (("get", "pods"), ("get", "secrets"), ("list", "alignmentruns.steersman.dev")):
            assert not installed.can(who, verb, resource), f"{who} must not {verb} {resource}"


def test_people_get_runs_with_the_roles_of_the_cluster(installed):
    """`edit` and `view` get their rights by aggregation."""
    if not installed.controllers:
        pytest.skip("no kube-controller-manager: ClusterRoles are not aggregated")
    for role in ("edit", "view"):
        installed.kubectl("create", "rolebinding", f"our-{role}", f"--clusterrole={role}", f"--user=our-{role}")

    def can(who: str, verb: str) -> bool:
        done = installed.kubectl("auth", "can-i", verb, "alignmentruns.steersman.dev", "--as", who, check=False)
        return done.stdout.strip() == "yes"

    until(lambda: can("our-edit", "create") and can("our-view", "list"), 60, "the roles were not aggregated")
    assert not can("our-view", "create")


def test_an_upgrade_keeps_runs(installed):
    installed.apply(run_of("kept", suspend=True))
    installed.install("--set", "gateway.drainSeconds=31")
    assert installed.get("alignmentrun", "kept")["metadata"]["name"] == "kept"
    config = installed.get("configmap", f"{installed.release}-steersman-gateway")["data"]["config.yaml"]
    assert yaml.safe_load(config)["drainSeconds"] == 31
    installed.kubectl("delete", "alignmentrun", "kept", "--wait=false")


def test_a_tiny_run_is_released(installed):
    """Pods run: everything is ready, `helm test` passes, the run goes from demo data to a released model."""
    if not installed.full:
        pytest.skip("no kubelet: pods do not run in this cluster")
    installed.helm("test", installed.release, "--timeout", "10m")
    installed.apply({**run_of("tiny"), "spec": TINY})
    ended = until(
        lambda: installed.get("alignmentrun", "tiny").get("status", {}).get("phase") in ("Succeeded", "Failed"),
        3600,
        "the run did not end in an hour",
    )
    status = installed.get("alignmentrun", "tiny")["status"]
    assert ended
    assert status["phase"] == "Succeeded", json.dumps(status, indent=2)
    for service in SERVICES:
        assert installed.get("statefulset", f"tiny-{service}")["spec"]["replicas"] == 0
