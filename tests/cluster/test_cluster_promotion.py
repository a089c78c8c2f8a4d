"""Who owns which field: what a release changed stays through `helm upgrade`, with Helm 3 and 4.

KServe itself is not needed: a CRD that keeps everything stands for its kinds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster_lab import ROOT, Lab, until

from services.controller.actions import Apply
from services.controller.kserve import KServeEndpoint
from services.controller.kube import FIELD_MANAGER
from services.controller.split import SplitEndpoint

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

FIRST, PROMOTED = "pvc://artifacts/models/base", "pvc://artifacts/runs/ml/demo/rl/model"
KSERVE = {"InferenceService": "v1beta1", "ServingRuntime": "v1alpha1"}


def crd(kind: str, version: str) -> dict[str, Any]:
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    plural = f"{kind.lower()}s"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.serving.kserve.io"},
        "spec": {
            "group": "serving.kserve.io",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [
                {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}},
            ],
        },
    }


@pytest.fixture(scope="module")
def kserve(installed: Lab) -> Iterator[None]:
    found = installed.kubectl("api-resources", "--api-group=serving.kserve.io", "-o", "name", namespaced=False).stdout
    if found:
        yield  # the real one is here
        return
    for kind, version in KSERVE.items():
        installed.apply(crd(kind, version))
    for kind in KSERVE:
        name = f"{kind.lower()}s.serving.kserve.io"
        ready = lambda name=name: not installed.kubectl("get", name, check=False).returncode  # noqa: E731
        until(ready, 60, f"{kind} is not served")
    yield
    for kind in KSERVE:
        installed.kubectl("delete", "crd", f"{kind.lower()}s.serving.kserve.io", namespaced=False)


@pytest.fixture(params=["helm", "other"])
def helm(request: pytest.FixtureRequest, installed: Lab, tmp_path: Path) -> Lab:
    """The Helm of the tests (4), and the one of STEERSMAN_HELM (3), each with a release of its own."""
    if request.param == "helm":
        return replace(installed, release="own4")
    other = os.environ.get("STEERSMAN_HELM")
    if not other:
        pytest.skip("STEERSMAN_HELM does not name another Helm")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "helm").symlink_to(other)
    (tools / "kubectl").symlink_to(installed.bin / "kubectl")
    return replace(installed, release="own3", bin=tools)


def upgrade(lab: Lab, *values: str) -> None:
    """Without what the shared installation has already."""
    apart = ("crds.install=false", "controller.enabled=false", f"gateway.kserve.name={lab.release}")
    options = [part for value in (*apart, *values) for part in ("--set", value)]
    chart = ROOT / "charts/steersman"
    lab.helm("upgrade", "--install", lab.release, str(chart), "-f", str(chart / "values-cpu.yaml"), *options)


def act(lab: Lab, actions: tuple[Any, ...]) -> None:
    """As the controller does."""
    for action in actions:
        assert isinstance(action, Apply)
        lab.apply(action.body, "--server-side", "--force-conflicts", f"--field-manager={FIELD_MANAGER}")


@pytest.mark.usefixtures("kserve")
def test_an_upgrade_keeps_the_model_that_kserve_serves(helm: Lab) -> None:
    mode = ("gateway.mode=kserve", f"gateway.kserve.storageUri={FIRST}")
    upgrade(helm, *mode)

    def predictor() -> dict[str, Any]:
        return helm.get("inferenceservice", helm.release)["spec"]["predictor"]

    try:
        assert predictor()["model"]["storageUri"] == FIRST
        act(helm, KServeEndpoint(helm.get("inferenceservice", helm.release), "demo").publish(PROMOTED))
        assert predictor()["model"]["storageUri"] == PROMOTED
        upgrade(helm, *mode, "gateway.kserve.maxReplicas=7")
        assert predictor()["model"]["storageUri"] == PROMOTED
        assert predictor()["maxReplicas"] == 7, "and the rest is the chart's"
        act(helm, KServeEndpoint(helm.get("inferenceservice", helm.release), "demo").publish(f"{PROMOTED}2"))
        upgrade(helm, *mode)
        assert predictor()["model"]["storageUri"] == f"{PROMOTED}2", "again"
    finally:
        helm.helm("uninstall", helm.release)


def test_an_upgrade_keeps_the_model_of_the_deployment(helm: Lab) -> None:
    upgrade(helm)
    name = f"{helm.release}-steersman-policy"

    def variables() -> dict[str, str]:
        (container,) = helm.get("deployment", name)["spec"]["template"]["spec"]["containers"]
        return {item["name"]: item.get("value", "") for item in container["env"]}

    try:
        before = variables()
        run = {"apiVersion": "v1", "kind": "Run", "metadata": {"name": "demo", "namespace": helm.namespace, "uid": "u"}}
        endpoint = SplitEndpoint(run, helm.get("deployment", name), None, None)
        act(helm, endpoint.publish("/artifacts/runs/ml/demo/rl/model"))
        assert "model=/artifacts/runs/ml/demo/rl/model" in variables().values()
        upgrade(helm, "policy.drainSeconds=77")
        assert "model=/artifacts/runs/ml/demo/rl/model" in variables().values()
        assert set(before) <= set(variables()), "and the rest is the chart's"
        grace = helm.get("deployment", name)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace > 77
    finally:
        helm.helm("uninstall", helm.release)
