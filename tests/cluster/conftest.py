"""A cluster from the kubeconfig: any, with or without kubelets.

STEERSMAN_CLUSTER_MODE   `full` (pods run) or `api` (API server and controllers only); found out when not set
STEERSMAN_IMAGE_CORE     image without torch, as the cluster can pull it; mode `full`
STEERSMAN_IMAGE_MODEL    image with torch; mode `full`
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Lab:
    """One namespace of a real cluster, and the tools of a person at a terminal."""

    bin: Path
    namespace: str
    full: bool
    release: str = "st"

    def helm(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run("helm", *arguments, "-n", self.namespace, check=check)

    def kubectl(
        self, *arguments: str, check: bool = True, stdin: str | None = None, namespaced: bool = True
    ) -> subprocess.CompletedProcess[str]:
        place = ("-n", self.namespace) if namespaced else ()
        return self._run("kubectl", *place, *arguments, check=check, stdin=stdin)

    def install(self, *values: str) -> None:
        """Installs or upgrades the chart as a trial on CPUs."""
        chart = ROOT / "charts/steersman"
        images = []
        if self.full:
            for key, variable in (("core", "STEERSMAN_IMAGE_CORE"), ("gpu", "STEERSMAN_IMAGE_MODEL")):
                repository, _, tag = os.environ[variable].rpartition(":")
                images += ["--set", f"images.{key}.repository={repository}", "--set", f"images.{key}.tag={tag}"]
        wait = ["--wait", "--timeout", "15m"] if self.full else []
        self.helm(
            "upgrade", "--install", self.release, str(chart), "-f", str(chart / "values-cpu.yaml"),
            "--set", "crds.keep=false", "--set", "artifacts.keep=false", *images, *wait, *values,
        )  # fmt: skip

    def can(self, who: str, verb: str, resource: str) -> bool:
        """Asks the API server by impersonation."""
        account = f"system:serviceaccount:{self.namespace}:{self.release}-steersman-{who}"
        answer = self.kubectl("auth", "can-i", verb, resource, "--as", account, check=False)
        return answer.stdout.strip() == "yes"

    def _run(
        self, tool: str, *arguments: str, check: bool, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self.bin / tool), *arguments], capture_output=True, text=True, input=stdin, timeout=1200, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{tool} {' '.join(arguments)}: {done.stderr or done.stdout}")
        return done


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
    print(f"cluster {version.git_version}, mode {mode}")
    namespace = f"steersman-test-{uuid.uuid4().hex[:6]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    core.create_namespace({"metadata": {"name": namespace, "labels": labels}})
    found = Lab(_tools(), namespace, mode == "full")
    yield found
    found.helm("uninstall", found.release, "--ignore-not-found", check=False)
    core.delete_namespace(namespace)


def _has_ready_node(core: Any) -> bool:
    return any(
        condition.type == "Ready" and condition.status == "True"
        for node in core.list_node().items
        for condition in node.status.conditions or []
    )


def _tools() -> Path:
    spec = importlib.util.spec_from_file_location("fetch_kube_tools", ROOT / "scripts/fetch_kube_tools.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fetch()
