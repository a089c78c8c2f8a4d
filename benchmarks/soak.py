"""Hours of the same work: does anything grow, and is the end as fast as the beginning?

    python -m benchmarks.soak [--part gateway training] [--seconds 3600] [--out FILE]

- gateway: customers who ask without a pause, over a policy service whose weights are changed every few seconds.
- training: `steersman run`, steps of PPO with all its services.

Every process is a real one, with a tiny model. Their resident memory, open handles and threads are sampled; the first
quarter is warm-up. A slope is that of a line through the means of twenty spans of time, per hour, with its interval of
95%; what surely grew (the interval's lower end times the measured hours) by more than a twentieth, or by more than
three handles or threads, is bad, as is an error, and an end whose median is half as slow again as the beginning's.
The last line is one JSON object, which is also written to build/bench/soak.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from scipy import stats

from benchmarks.processes import alignment_run, running, until_ready
from benchmarks.report import command_line, heading, write
from steersman.local.process import Child, free_ports

WARM_UP = 0.25
"""Share of the time before anything is measured."""
SPANS = 20
CUSTOMERS = 4
GROWTH = {"memory_mib": 0.05, "handles": 3.0, "threads": 3.0}
"""More than this is bad: memory as a share of what there was, the others in numbers."""
SLOWER = 1.5
COLUMNS = tuple(GROWTH)


# -- measuring ---------------------------------------------------------------------------------------------------------


def slope(seconds: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Change per hour of a measured number, with its 95% interval.

    A line through the means of at most SPANS spans: samples that follow one another are not independent, means are
    nearly so.

    Args:
        seconds: when, ascending. values: what, of the same length, at least three.
    """
    spans = min(SPANS, len(seconds))
    when = [float(np.mean(part)) / 3600 for part in np.array_split(np.asarray(seconds, float), spans)]
    what = [float(np.mean(part)) for part in np.array_split(np.asarray(values, float), spans)]
    line = stats.linregress(when, what)
    # Numbers that are all the same have no correlation, and so, for scipy, no error.
    reach = float(stats.t.ppf(0.975, spans - 2)) * float(line.stderr) if len(set(what)) > 1 else 0.0
    return {"per_hour": float(line.slope), "low": float(line.slope) - reach, "high": float(line.slope) + reach}


class Watch:
    """Samples processes in a thread."""

    def __init__(self, processes: dict[str, psutil.Process], every: float) -> None:
        self._processes, self._every = processes, every
        self._rows: dict[str, list[tuple[float, float, int, int]]] = {name: [] for name in processes}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        began = time.monotonic()
        while not self._over.wait(self._every):
            for name, process in self._processes.items():
                with contextlib.suppress(psutil.Error):
                    row = (process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
                    self._rows[name].append((time.monotonic() - began, *row))

    def found(self) -> tuple[dict[str, Any], list[str]]:
        """Slopes by process, and what is bad about them."""
        report: dict[str, Any] = {}
        bad: list[str] = []
        for name, rows in self._rows.items():
            rows = rows[int(len(rows) * WARM_UP) :]
            if len(rows) < 3:
                bad.append(f"{name}: only {len(rows)} samples; it ended, or --seconds is too short")
                continue
            seconds, *columns = zip(*rows, strict=True)
            report[name] = {"samples": len(rows)}
            for column, values in zip(COLUMNS, columns, strict=True):
                line = slope(seconds, values)
                report[name][column] = {"mean": float(np.mean(values)), **line}
                grown = line["low"] * (seconds[-1] - seconds[0]) / 3600
                if grown > GROWTH[column] * (float(np.mean(values)) if column == "memory_mib" else 1.0):
                    bad.append(f"{name}: {column} grew by at least {grown:.1f}")
        return report, bad


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds of the first and the last fifth after the warm-up."""
    kept = seconds[int(len(seconds) * WARM_UP) :]
    fifth = max(1, len(kept) // 5)
    report = {}
    for name, part in (("begin", kept[:fifth]), ("end", kept[-fifth:])):
        for percent in (50, 95):
            report[f"{name}_ms_p{percent}"] = 1e3 * float(np.percentile(part, percent))
    report["end_over_begin"] = report["end_ms_p50"] / report["begin_ms_p50"]
    return report


def _slower(name: str, times: dict[str, float]) -> list[str]:
    ratio = times["end_over_begin"]
    return [f"{name}: the end is {ratio:.2f} times as slow as the beginning"] if ratio > SLOWER else []


# -- the gateway -------------------------------------------------------------------------------------------------------


def soak_gateway(seconds: float) -> dict[str, Any]:
    from benchmarks import common
    from steersman.testing.models import save_model_folder, tiny_qwen2

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        base = save_model_folder(folder / "base", tiny_qwen2())
        engine = stack.enter_context(common.service("policy", 1, model=str(base), precision="fp32", device="cpu"))
        (port,) = free_ports(1)
        settings = {
            "port": port,
            "grpcPort": 0,
            "database": f"sqlite:///{folder}/gateway.db",
            "policy": {"endpoints": [engine.target]},
        }
        (folder / "gateway.yaml").write_text(yaml.safe_dump(settings))
        gateway = stack.enter_context(running("services.gateway", "--config", str(folder / "gateway.yaml")))
        processes = {"gateway": psutil.Process(gateway.pid), "policy": psutil.Process(engine.pid)}
        stop = threading.Event()
        swaps: list[float] = []
        swapping = threading.Thread(target=_swap, args=(base, engine, swaps, stop), daemon=True)
        until_ready(port, gateway)  # what its start takes is no growth
        with Watch(processes, max(0.5, seconds / 1000)) as watch:
            swapping.start()
            times, errors = asyncio.run(_customers(f"http://127.0.0.1:{port}", seconds))
            stop.set()
            swapping.join(60)
        report, bad = watch.found()
    answered = latency(times) if len(times) > 20 else {}
    bad += errors[:5]
    bad += _slower("answers", answered) if answered else [f"only {len(times)} answers"]
    bad += [] if len(swaps) > 1 else [f"only {len(swaps)} swaps of weights"]
    return {
        "seconds": seconds, "answers": len(times), "errors": len(errors), "swaps": len(swaps), "latency": answered,
        "processes": report, "bad": [f"gateway: {words}" for words in bad],
    }  # fmt: skip


def _swap(base: Path, engine: Any, swaps: list[float], stop: threading.Event) -> None:
    """Publishes other weights every two seconds."""
    import torch

    from benchmarks.sync import change
    from steersman.nn.load import load_tokenizer
    from steersman.nn.tokens import tokenizer_fingerprint
    from training.online.clients import PolicyReplica
    from training.online.policy_model import PolicyModel
    from training.online.pool import PolicyPool

    torch.set_num_threads(1)
    model = PolicyModel(base, None, None, None, device="cpu", precision="fp32", temperature=1.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    client = PolicyReplica(engine.target, engine.weights_target, 60.0, lambda text: None)
    with contextlib.closing(PolicyPool([client], tokenizer_fingerprint(load_tokenizer(base)), None)) as pool:
        while not stop.wait(2.0):
            change(model, generator)
            began = time.perf_counter()
            pool.publish(model.payload(torch.float32))
            swaps.append(time.perf_counter() - began)


async def _customers(url: str, seconds: float) -> tuple[list[float], list[str]]:
    """Seconds of every answer in order, and what was refused."""
    times: list[float] = []
    errors: list[str] = []

    async def ask(http: httpx.AsyncClient, index: int) -> None:
        number = 0
        while time.monotonic() < end:
            number += 1
            said = f"customer {index} asks for the {number}th time where the order is"
            body = {"messages": [{"role": "user", "content": said}], "max_tokens": 8, "stream": number % 2 == 0}
            began = time.perf_counter()
            try:
                answer = await http.post("/v1/chat/completions", json={"model": "steersman", **body})
                if answer.status_code != 200:
                    errors.append(f"{answer.status_code} {answer.text[:200]}")
            except httpx.HTTPError as error:
                errors.append(repr(error))
            times.append(time.perf_counter() - began)

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        end = time.monotonic() + seconds
        await asyncio.gather(*(ask(http, index) for index in range(CUSTOMERS)))
    return times, errors


# -- training ----------------------------------------------------------------------------------------------------------


def soak_training(seconds: float) -> dict[str, Any]:
    from steersman.testing.models import save_model_folder, tiny_qwen2

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        base = save_model_folder(folder / "base", tiny_qwen2())
        (folder / "run.yaml").write_text(yaml.safe_dump(_manifest(base)))
        arguments = ("run", "-f", str(folder / "run.yaml"), "--run-dir", str(folder / "run"))
        run = stack.enter_context(running("steersman", *arguments, STEERSMAN_PROGRESS="json", HF_HUB_OFFLINE="1"))
        processes = {"executor": psutil.Process(run.pid), **_members(run)}
        metrics = folder / "run" / "rl" / "metrics.jsonl"
        with Watch(processes, max(0.5, seconds / 1000)) as watch:
            ended = None
            end = time.monotonic() + seconds
            while time.monotonic() < end and (ended := run.poll()) is None:
                time.sleep(0.2)
        report, bad = watch.found()
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    times = latency([row["seconds"] for row in rows if "seconds" in row]) if len(rows) > 20 else {}
    bad += [f"the run ended with {ended}"] if ended is not None else []
    bad += _slower("steps", times) if times else [f"only {len(rows)} steps"]
    return {
        "seconds": seconds, "steps": len(rows), "latency": times, "processes": report,
        "bad": [f"training: {words}" for words in bad],
    }  # fmt: skip


def _manifest(base: Path) -> dict[str, Any]:
    few = {"maxSteps": 2, "batchSize": 4, "microBatchSize": 4}
    steps = {"steps": 10_000_000, "promptsPerStep": 4, "samplesPerPrompt": 2, "generation": {"maxNewTokens": 8}}
    spec = {
        "seed": 5,
        "model": {"base": str(base), "precision": "fp32", "device": "cpu", "threads": 1},
        "data": {"demo": {"demonstrations": 16, "preferences": 16, "prompts": 64, "heldoutPrompts": 8}},
        "stages": [{"sft": few}, {"rewardModel": few}, {"rl": steps}],
    }
    return alignment_run("soak", spec)


def _members(run: Child) -> dict[str, psutil.Process]:
    """The processes of the RL stage, once its trainer and its policy service are there."""
    names = ("training.stage", "services.policy", "services.reward")
    deadline = time.monotonic() + 3600
    while time.monotonic() < deadline:
        found: dict[str, psutil.Process] = {}
        for child in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                # Services start while earlier stages train.
                found |= {name: child for name in names if name in words and (name != names[0] or "rl" in words)}
        if {"training.stage", "services.policy"} <= found.keys():
            return found
        if run.poll() is not None:
            raise SystemExit(f"soak: the run ended with {run.returncode} before its reinforcement learning began")
        time.sleep(0.2)
    raise SystemExit("soak: the run has not come to its reinforcement learning within an hour")


PARTS = {"gateway": soak_gateway, "training": soak_training}


def main() -> int:
    parser = command_line(__doc__, "soak")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=3600.0, help="of each part")
    options = parser.parse_args()
    report: dict[str, Any] = {part: PARTS[part](options.seconds) for part in options.part}
    report["bad"] = [words for part in options.part for words in report[part].pop("bad")]
    write({**heading(1), **report}, options.out)
    print(json.dumps(report), flush=True)
    return 1 if report["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
