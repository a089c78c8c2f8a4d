"""A cluster from the kubeconfig: any, with or without kubelets.

STEERSMAN_CLUSTER_MODE   `full` (pods run) or `api` (API server and controllers only); found out when not set
STEERSMAN_IMAGE_CORE     image without torch, as the cluster can pull it; mode `full`
STEERSMAN_IMAGE_MODEL    image with torch; mode `full`

In mode `api` the tests play the kubelet; where no kube-controller-manager runs either, the Job controller and the
garbage collector as well.
"""

from __future__ import annotations

import importlib.util
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_lab import ROOT, Lab, until


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A fresh namespace, removed at the end; the tests are left out where no API server answers."""
    from kubernetes import client, config

    try:
        config.load_kube_config()
        version = client.VersionApi().get_code(_request_timeout=10)
    except Exception as error:
        pytest.skip(f"no cluster: set KUBECONFIG to run these tests ({type(error).__name__})")
    core = client.CoreV1Api()
    mode = os.environ.get("STEERSMAN_CLUSTER_MODE") or ("full" if _has_ready_node(core) else "api")
    if mode == "full" and not {"STEERSMAN_IMAGE_CORE", "STEERSMAN_IMAGE_MODEL"} <= set(os.environ):
        pytest.skip(
            "the cluster runs pods: set STEERSMAN_IMAGE_CORE and STEERSMAN_IMAGE_MODEL to images it can pull, "
            "or STEERSMAN_CLUSTER_MODE=api"
        )
    namespace = f"steersman-test-{uuid.uuid4().hex[:6]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    core.create_namespace({"metadata": {"name": namespace, "labels": labels}})
    controllers = mode == "full" or _has_controllers(core, namespace)
    print(f"cluster {version.git_version}, mode {mode}, controllers: {'yes' if controllers else 'no'}")
    found = Lab(_tools(), namespace, mode == "full", controllers)
    yield found
    found.helm("uninstall", found.release, "--ignore-not-found", check=False)
    core.delete_namespace(namespace)


@pytest.fixture(scope="session")
def installed(lab: Lab) -> Lab:
    """The chart's installation, which all modules share; the last one takes it away."""
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


def _has_ready_node(core: Any) -> bool:
    return any(
        condition.type == "Ready" and condition.status == "True"
        for node in core.list_node().items
        for condition in node.status.conditions or []
    )


def _has_controllers(core: Any, namespace: str) -> bool:
    """The ServiceAccount controller gives a fresh namespace its `default`, in a moment."""
    for _ in range(20):
        if any(account.metadata.name == "default" for account in core.list_namespaced_service_account(namespace).items):
            return True
        time.sleep(0.5)
    return False


def _tools() -> Path:
    spec = importlib.util.spec_from_file_location("fetch_kube_tools", ROOT / "scripts/fetch_kube_tools.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fetch()
