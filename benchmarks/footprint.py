"""Peak memory of every process for the embedded model, beside the chart's limit: `build/bench/footprint.json`.

A small run on the demo's data, as the chart's profile without GPUs executes it: services with that profile's settings,
weights over gRPC (no shared folder), full weights in SFT and an adapter in RL, then an evaluation that publishes whole
models; a gateway that answers, and the controller's process with everything loaded. A process's peak is the kernel's
VmHWM, children included.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.processes import alignment_run, peak_mib
from benchmarks.report import command_line, write
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun
from steersman.local import folder, process
from steersman.local.services import endpoint_overrides, services_of
from steersman.local.supervisor import Service, Supervisor
from steersman.rpc.token import RUN_TOKEN

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts/steersman"
MIB = 2**20
UNITS = {"Mi": 1, "Gi": 1024, "Ti": 1024 * 1024}
GENERATION = {"maxNewTokens": 48}
STAGES: list[dict[str, Any]] = [
    {"sft": {"lora": None, "batchSize": 8, "maxSteps": 2}},
    {"rewardModel": {"batchSize": 8, "maxSteps": 2}},
    {"rl": {"steps": 2, "promptsPerStep": 8, "samplesPerPrompt": 4, "generation": GENERATION}},
    {"evaluate": {"generation": GENERATION, "maxPrompts": 16, "checks": [{"name": "demo-rubric"}]}},
]
SPEC: dict[str, Any] = {
    "model": {"threads": 1},
    "data": {"demo": {"demonstrations": 64, "preferences": 64, "prompts": 32, "heldoutPrompts": 16}},
    "stages": STAGES,
}


class Peaks:
    """Largest resident sets by name, of processes that are watched while they run."""

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}
        self._watched: dict[int, str] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def add(self, name: str, pid: int) -> None:
        self._watched[pid] = name

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            for pid, name in list(self._watched.items()):
                self.mib[name] = max(self.mib.get(name, 0.0), _tree_peak(pid))


def _tree_peak(pid: int) -> float:
    """Sum of the peaks of a process and its living children, MiB."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for one in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(OSError):
                total += peak_mib(one.pid)
    return total


def chart_memory() -> dict[str, dict[str, int]]:
    """Requests and limits of memory by component in the chart's small profile, MiB."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    found = {}
    for name, block in small_profile().items():
        values[name] = {**values[name], **block} if isinstance(values.get(name), dict) else block
    for name, block in values.items():
        if isinstance(block, dict) and "resources" in block:
            resources = block["resources"]
            found[name] = {kind: mib(resources[kind]["memory"]) for kind in ("requests", "limits")}
    return found


def mib(quantity: str) -> int:
    return int(float(quantity[:-2]) * UNITS[quantity[-2:]])


def small_profile() -> dict[str, Any]:
    return dict(yaml.safe_load((CHART / "values-cpu.yaml").read_text()))


def measure(work: Path) -> dict[str, float]:
    """Peaks by process, MiB."""
    run_dir = work / "run"
    run_dir.mkdir(parents=True)
    run = folder.resolve(load_model(AlignmentRun, alignment_run("footprint", SPEC), "footprint"), run_dir, work)
    folder.write_manifest(run, run_dir)
    environment = process.child_environment(1, offline=True) | {RUN_TOKEN: secrets.token_urlsafe(32)}
    with Peaks() as peaks:
        _run(peaks, "prepare", "steersman.local.prepare", [str(folder.manifest_path(run_dir))], run_dir, environment)
        prepared = json.loads((run_dir / "prepared.json").read_text())
        spec = run.spec.model_dump(mode="json", by_alias=True)
        spec["model"] |= {key: prepared[key] for key in ("precision", "device")}
        run = folder.with_spec(run, spec)
        folder.write_manifest(run, run_dir)
        with Supervisor(run_dir / "services", environment, 600.0) as supervisor:
            for name in run.stage_names():
                services = services_of(run, name, run_dir, Path(prepared["base"]))
                services = [_as_in_the_chart(service) for service in services]
                supervisor.ensure(services)
                for service in services:
                    peaks.add(service.name.rpartition("-")[0], supervisor.pid(service.name))
                arguments = ["--run-dir", str(run_dir), "--stage", name]
                for override in endpoint_overrides(run, services, supervisor):
                    arguments += ["--set", override]
                _run(peaks, f"trainer {name}", "training.stage", arguments, run_dir, environment)
            _ask_a_gateway(peaks, supervisor, services, environment)
        _load_the_controller(peaks, environment)
    return peaks.mib


def _as_in_the_chart(service: Service) -> Service:
    """A service of the run with the settings of the chart's small profile."""
    chart = small_profile()[service.name.rpartition("-")[0]]["config"]
    kept = {key: value for key, value in chart.items() if key in ("kvCacheTokens", "threads", "engine")}
    return replace(service, config={**service.config, **kept})


def _run(
    peaks: Peaks, name: str, module: str, arguments: list[str], run_dir: Path, environment: dict[str, str]
) -> None:
    print(f"footprint  {name}", flush=True)
    log = run_dir / "logs" / f"{name.replace(' ', '-')}.log"
    child = process.start(module, arguments, log, environment, own_output=True)
    peaks.add(name, child.pid)
    try:
        if child.wait():
            raise SystemExit(f"{name} failed: {process.last_words(log)}")
    finally:
        process.stop([child])
    print(f"footprint  {name}: {peaks.mib[name]:.0f} MiB", flush=True)


def _ask_a_gateway(
    peaks: Peaks, supervisor: Supervisor, services: list[Service], environment: Mapping[str, str]
) -> None:
    """Thirty-two chats at a time, as many as the profile's engine answers without a queue."""
    print("footprint  gateway", flush=True)
    policy = next(service for service in services if service.name == "policy-0")
    public = replace(
        policy, name="public-0", config={**policy.config, "tokenEnv": None, "weightsPort": None}, ports=("port",)
    )
    supervisor.ensure([public])
    config = {"policy": {"endpoints": [f"127.0.0.1:{supervisor.port('public-0')}"]}, "database": None}
    gateway = Service("gateway", "services.gateway", None, config, ("port", "grpcPort"))
    supervisor.ensure([public, gateway])
    peaks.add("gateway", supervisor.pid("gateway"))
    peaks.add("policy", supervisor.pid("public-0"))
    url = f"http://127.0.0.1:{supervisor.port('gateway')}/v1/chat/completions"
    body = {"model": "steersman", "max_tokens": 48, "messages": [{"role": "user", "content": "Where is my order 2?"}]}
    with ThreadPoolExecutor(32) as threads:
        for answer in threads.map(lambda _: httpx.post(url, json=body, timeout=600), range(64)):
            answer.raise_for_status()
    time.sleep(0.5)


def _load_the_controller(peaks: Peaks, environment: Mapping[str, str]) -> None:
    """Everything that it imports, and its libraries; a run adds kilobytes."""
    print("footprint  controller", flush=True)
    load = "import time, services.controller.operator, services.controller.signals; time.sleep(2)"
    child = subprocess.Popen([sys.executable, "-c", load], env=dict(environment))
    peaks.add("controller", child.pid)
    if child.wait():
        raise SystemExit("the controller's modules cannot be imported")


def report(peaks: Mapping[str, float]) -> dict[str, Any]:
    """What is written: each process beside what the chart gives its component."""
    chart = chart_memory()
    processes = {}
    for name, peak in sorted(peaks.items()):
        component = "trainer" if name == "prepare" else name.split()[0]
        processes[name] = {
            "component": component,
            "peak_mib": round(peak),
            "request_mib": chart[component]["requests"],
            "limit_mib": chart[component]["limits"],
            "fits": peak <= chart[component]["limits"],
        }
    return {
        "model": "smollm2-135m-instruct",
        "profile": "values-cpu.yaml",
        "machine": {"cores": len(os.sched_getaffinity(0)), "memory_mib": psutil.virtual_memory().total // MIB},
        "processes": processes,
    }


def main() -> None:
    arguments = command_line(__doc__, "footprint").parse_args()
    with tempfile.TemporaryDirectory(prefix="footprint-") as work:
        found = report(measure(Path(work)))
    write(found, arguments.out)
    for name, row in found["processes"].items():
        fits = "" if row["fits"] else "TOO SMALL"
        print(f"{name:24} peak {row['peak_mib']:6} MiB  limit {row['limit_mib']:6} MiB  {fits}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
