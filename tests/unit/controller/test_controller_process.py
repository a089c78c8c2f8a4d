"""`python -m services.controller` as the chart starts it, with leader election, against the API server mock."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import kmock
import pytest
import yaml
from api_server import ApiServer
from fake_kube import TEMPLATES, alignment_run
from operators import PATIENCE, until


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server, kmock.Server(server):
        yield server


async def test_the_process_is_elected_executes_a_run_and_ends_by_a_signal(api: ApiServer, tmp_path: Path) -> None:
    for name, template in TEMPLATES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(template))
    config = {
        "namespaces": ["ml"],
        "templates": str(tmp_path),
        "leaderElection": {"lease": "controller", "namespace": "ml"},
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    kubeconfig = {
        "current-context": "mock",
        "contexts": [{"name": "mock", "context": {"cluster": "mock", "user": "mock"}}],
        "clusters": [{"name": "mock", "cluster": {"server": str(api.url).rstrip("/")}}],
        "users": [{"name": "mock", "user": {"token": "none"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    command = [sys.executable, "-m", "services.controller", "--config", str(tmp_path / "config")]
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig")}
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=log)
    try:
        api.kube.put(alignment_run(stages=[{"sft": {}}]))
        await until(lambda: process.returncode is not None or api.kube.find("Job", "demo-sft"))
        assert api.kube.find("Job", "demo-sft"), (tmp_path / "log").read_text()
        assert api.kube.find("Lease", "controller")
        process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(process.wait(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
    assert code == 0, (tmp_path / "log").read_text()
