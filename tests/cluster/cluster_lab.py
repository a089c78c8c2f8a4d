"""One namespace of a real cluster, and the tools of a person at a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Lab:
    """A namespace with the chart's release in it."""

    bin: Path
    namespace: str
    full: bool
    controllers: bool
    """kube-controller-manager runs: Jobs get pods, and what is deleted goes."""
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

    def apply(self, document: dict[str, Any], *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.kubectl("apply", *options, "-f", "-", stdin=yaml.safe_dump(document), check=check)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """The object; empty when there is none."""
        done = self.kubectl("get", kind, name, "-o", "json", "--ignore-not-found")
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def list(self, kind: str, selector: str) -> list[dict[str, Any]]:
        return json.loads(self.kubectl("get", kind, "-l", selector, "-o", "json").stdout)["items"]

    def patch(self, kind: str, name: str, body: dict[str, Any], *options: str) -> None:
        self.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps(body), *options)

    def set_status(self, kind: str, name: str, status: dict[str, Any]) -> None:
        self.patch(kind, name, {"status": status}, "--subresource=status")

    def can(self, who: str, verb: str, resource: str) -> bool:
        """Asks the API server by impersonation; `pods/log` is a subresource, `leases:one` the object of that name."""
        kind, _, subresource = resource.partition("/")
        account = f"system:serviceaccount:{self.namespace}:{self.release}-steersman-{who}"
        answer = self.kubectl(
            "auth", "can-i", verb, kind.replace(":", "/"), f"--subresource={subresource}", "--as", account, check=False
        )
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


def run_of(name: str, **spec: Any) -> dict[str, Any]:
    """An AlignmentRun."""
    return {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": name},
        "spec": {"data": {"demo": {}}, "stages": [{"sft": {}}, {"evaluate": {}}], **spec},
    }


def until(what: Callable[[], Any], seconds: float, why: str) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.5)
    raise AssertionError(why)
