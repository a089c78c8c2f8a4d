"""A small real gRPC service as a child process, and a manifest."""

from __future__ import annotations

import time
from collections.abc import Callable

from steersman.config.manifest import AlignmentRun
from steersman.local.supervisor import Service

TOY = """
import asyncio, signal, sys, yaml
from pathlib import Path
from steersman.rpc.server import Server, ServerConfig

config = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
if "refuse" in config:
    print("toy: " + config["refuse"], file=sys.stderr)
    raise SystemExit(3)
if "crash_file" in config and Path(config["crash_file"]).exists():
    raise SystemExit(4)

async def main():
    server = Server(ServerConfig(), [(config["port"], [(lambda servicer, server: None, None, "toy")])])
    await server.start()
    await server.ready()
    if config.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        await asyncio.sleep(600)
    await server.run_until_signal()

asyncio.run(main())
"""


def toy(name: str = "toy-0", **config: object) -> Service:
    return Service(name, "toy_service", "toy", config)


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits for a condition; the limit only ends a test that would hang."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.05)


def manifest(**spec: object) -> AlignmentRun:
    """A run on the demo's data; `spec` in camelCase."""
    stages = [{"sft": {}}, {"rewardModel": {}}, {"rl": {}}, {"evaluate": {}}]
    document = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "a-run"},
        "spec": {"data": {"demo": {}}, "stages": stages, **spec},
    }
    return AlignmentRun.model_validate(document, by_alias=True, by_name=False)
