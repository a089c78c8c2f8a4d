"""What the gateway adds to an engine that is called directly.

    python -m benchmarks.gateway [--quick] [--only streams requests idle overload] [--out FILE]

Engine, gateway and client are processes of their own. The engine is `steersman.testing.fake_policy`, so the numbers
are the gateway's. Four parts, about three minutes on two idle cores:

- streams: 64 at once, each at 33 tokens a second; direct and gateway rounds alternate, so that noise hits both.
- requests: whole answers, as many as a gateway on one core gives; engine and client have the other cores.
- idle: 2,000 open streams that wait for their next token.
- overload: ten times the capacity for a minute.

A busy machine spoils rates and latencies; `gateway_cpu_ms_per_request` suffers least. Prints every part as it ends and
writes build/bench/gateway.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import uvloop

from benchmarks.processes import running, until_ready
from benchmarks.report import command_line, heading, write
from steersman.local.process import free_ports
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import common_pb2, policy_pb2, policy_pb2_grpc

_PART_SECONDS = 900
"""A part that takes longer has met a machine that is too busy to measure anything."""
WORDS = 48
QUESTION = " ".join(["word"] * (WORDS - 2))  # "You said: " makes two more
BODY = {"model": "steersman", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4096}
BRIEF = json.dumps({**BODY, "messages": [{"role": "user", "content": "one two three"}]}).encode()


# --- processes --------------------------------------------------------------------------------------------------


async def run_engine(port: int, seconds_per_token: float) -> None:
    """The engine's process."""
    async with serve_policy(FakePolicy(seconds_per_token=seconds_per_token, keep_requests=False), port):
        await asyncio.Event().wait()


@dataclass
class Stack:
    """A running engine and gateway."""

    engine: str
    port: int
    gateway: psutil.Process


@contextlib.contextmanager
def stack(seconds_per_token: float, *, one_core: bool = False, **limits: Any) -> Iterator[Stack]:
    """Starts both; with `one_core` the gateway may use only the first core, and the others only the rest."""
    engine_port, port = free_ports(2)
    cores = sorted(os.sched_getaffinity(0))
    first, rest = ({cores[0]}, set(cores[1:]) or {cores[0]}) if one_core else (set(cores), set(cores))
    with contextlib.ExitStack() as started:
        folder = started.enter_context(tempfile.TemporaryDirectory())
        settings = {
            "port": port,
            "grpcPort": 0,
            "policy": {"endpoints": [f"127.0.0.1:{engine_port}"]},
            "database": f"sqlite:///{folder}/gateway.db",
            "limits": {"concurrentAnswers": 4096, "queuedAnswers": 4096, **limits},
        }
        config = Path(folder) / "gateway.yaml"
        config.write_text(json.dumps(settings))
        paced = ("--engine", str(engine_port), "--pace", str(seconds_per_token))
        engine = started.enter_context(running("benchmarks.gateway", *paced))
        gateway = started.enter_context(running("services.gateway", "--config", str(config)))
        started.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(engine.pid, rest)
        os.sched_setaffinity(gateway.pid, first)
        os.sched_setaffinity(0, rest)
        until_ready(port, engine, gateway)
        yield Stack(f"127.0.0.1:{engine_port}", port, psutil.Process(gateway.pid))


# --- clients ----------------------------------------------------------------------------------------------------


def post_of(body: bytes) -> bytes:
    """A question to the gateway as it goes over the wire."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + body


class Http:
    """One keep-alive connection: just enough HTTP/1.1 to cost next to nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, body: bytes) -> tuple[int, AsyncIterator[bytes]]:
        """Status, and the chunks of the body. A refusal must say when to come again."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        assert self._reader is not None
        self._writer.write(post_of(body))
        lines = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        status = int(lines[0].split()[1])
        assert status != 429 or any(line.startswith(b"retry-after:") for line in lines)
        return status, self._chunks(self._reader, length)

    @staticmethod
    async def _chunks(reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[bytes]:
        if length is not None:
            yield await reader.readexactly(length)
            return
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)

    def close(self) -> None:
        """The next question opens another connection."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def stream_direct(stub: policy_pb2_grpc.PolicyServiceStub) -> tuple[float, int]:
    """Seconds to the first token, and tokens."""
    message = common_pb2.Message(role="user", content=QUESTION)
    sampling = common_pb2.SamplingParams(max_new_tokens=4096)
    start, first, tokens = time.perf_counter(), 0.0, 0
    async for part in stub.Chat(policy_pb2.PolicyServiceChatRequest(messages=[message], sampling=sampling)):
        first = first or time.perf_counter() - start
        tokens += len(part.tokens)
    return first, tokens


async def stream_gateway(http: Http) -> tuple[float, int]:
    start, first, tokens = time.perf_counter(), 0.0, 0
    status, chunks = await http.post(json.dumps({**BODY, "stream": True}).encode())
    assert status == 200, status
    async for chunk in chunks:
        first = first or time.perf_counter() - start
        tokens += chunk.count(b'"content":"') - chunk.count(b'"content":""')
    return first, tokens


# --- measurements -----------------------------------------------------------------------------------------------


async def _round(streams: int, each: int, one: Any) -> tuple[float, list[float]]:
    """Tokens a second and times to the first token of `streams` clients that ask `each` times in a row."""
    firsts: list[float] = []
    total = 0

    async def client(index: int) -> None:
        nonlocal total
        # Streams of real users do not begin at the same instant.
        await asyncio.sleep(index * 0.02)
        for _ in range(each):
            first, tokens = await one(index)
            firsts.append(first)
            total += tokens

    start = time.perf_counter()
    await asyncio.gather(*(client(index) for index in range(streams)))
    return total / (time.perf_counter() - start), firsts


async def measure_streams(pace: float, streams: int, each: int, rounds: int) -> dict[str, float]:
    direct_rates, gateway_rates = [], []
    direct_firsts: list[float] = []
    gateway_firsts: list[float] = []
    with stack(pace) as live:
        channel = grpc.aio.insecure_channel(live.engine)
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        connections = [Http(live.port) for _ in range(streams)]
        await _round(streams, 1, lambda index: stream_gateway(connections[index]))
        for _ in range(rounds):
            rate, firsts = await _round(streams, each, lambda index: stream_direct(stub))
            direct_rates.append(rate)
            direct_firsts += firsts
            rate, firsts = await _round(streams, each, lambda index: stream_gateway(connections[index]))
            gateway_rates.append(rate)
            gateway_firsts += firsts
        for connection in connections:
            connection.close()
        await channel.close()
    added = [1000 * (np.quantile(gateway_firsts, q) - np.quantile(direct_firsts, q)) for q in (0.5, 0.99)]
    return {
        "streams": streams,
        "direct_tokens_per_second": statistics.median(direct_rates),
        "gateway_tokens_per_second": statistics.median(gateway_rates),
        "throughput_ratio": statistics.median(gateway_rates) / statistics.median(direct_rates),
        "ttft_direct_ms_p50": 1000 * float(np.quantile(direct_firsts, 0.5)),
        "ttft_added_ms_p50": float(added[0]),
        "ttft_added_ms_p99": float(added[1]),
    }


async def measure_requests(seconds: float, clients: int) -> dict[str, float]:
    """Requests a second of a gateway that may use one core; the engine answers at once."""
    body = json.dumps({**BODY, "messages": [{"role": "user", "content": "hi"}]}).encode()
    with stack(0, one_core=True) as live:
        end, done = 0.0, 0

        async def client() -> None:
            nonlocal done
            http = Http(live.port)
            while time.perf_counter() < end:
                status, chunks = await http.post(body)
                assert status == 200, status
                async for _ in chunks:
                    pass
                done += 1
            http.close()

        # The first warms up.
        for measured in (2.0, seconds):
            done, end, start = 0, time.perf_counter() + measured, time.perf_counter()
            used = sum(live.gateway.cpu_times()[:2])
            await asyncio.gather(*(client() for _ in range(clients)))
            wall, used = time.perf_counter() - start, sum(live.gateway.cpu_times()[:2]) - used
    return {"fake_engine_rps": done / wall, "gateway_cpu_ms_per_request": 1000 * used / done}


async def measure_idle(streams: int) -> dict[str, float]:
    """Memory of the gateway with this many open streams that wait for their next token."""
    with stack(3600) as live:
        before = live.gateway.memory_info().rss
        body = json.dumps({**BODY, "stream": True}).encode()
        writers = []
        for _ in range(streams):
            _, writer = await asyncio.open_connection("127.0.0.1", live.port)
            writer.write(post_of(body))
            writers.append(writer)
        deadline = time.monotonic() + 120
        while running_answers(live.port) < streams and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        held, memory = running_answers(live.port), live.gateway.memory_info().rss
        for writer in writers:
            writer.close()
        while running_answers(live.port) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
    return {
        "idle_streams": held,
        "idle_memory_gib": memory / 2**30,
        "idle_memory_kib_per_stream": (memory - before) / 1024 / max(held, 1),
    }


def running_answers(port: int) -> int:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    line = next(line for line in text.splitlines() if line.startswith("steersman_gateway_running_answers "))
    return int(float(line.split()[1]))


async def once(http: Http) -> tuple[int, float]:
    """Status of a brief question, and seconds until its answer is read."""
    start = time.perf_counter()
    status, chunks = await http.post(BRIEF)
    async for _ in chunks:
        pass
    return status, time.perf_counter() - start


async def measure_overload(seconds: float, times: float = 10, places: int = 8, pace: float = 0.05) -> dict[str, float]:
    """`times` the capacity: latency of the served, share refused, memory, and the time to recover."""
    with stack(pace, concurrentAnswers=places, queuedAnswers=places // 4) as live:
        calm = Http(live.port)
        unloaded = statistics.median([(await once(calm))[1] for _ in range(20)])
        calm.close()  # the gateway ends a connection that says nothing for so long
        rate = times * places / unloaded
        served: list[float] = []
        refused = 0

        async def offer() -> None:
            nonlocal refused
            http = Http(live.port)
            status, taken = await once(http)
            http.close()
            if status == 200:
                served.append(taken)
            else:
                assert status == 429, status
                refused += 1

        memory = 0
        start, sent = time.perf_counter(), 0
        tasks: set[asyncio.Task[None]] = set()
        while (now := time.perf_counter() - start) < seconds:
            # An open loop, as far as the client's core allows: at most 200 unanswered.
            while sent < now * rate and len(tasks) < 200:
                task = asyncio.create_task(offer())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            if not memory and now > seconds / 4:
                memory = live.gateway.memory_info().rss
            await asyncio.sleep(0.005)
        grown = live.gateway.memory_info().rss - memory
        await asyncio.gather(*tasks)
        recovery = time.perf_counter()
        while (await once(calm))[1] > 2 * unloaded and time.perf_counter() - recovery < 30:
            pass
        recovered = time.perf_counter() - recovery
        calm.close()
    return {
        "overload_seconds": seconds,
        "overload_times_capacity": sent / seconds * unloaded / places,
        "overload_offered_per_second": sent / seconds,
        "overload_served_per_second": len(served) / seconds,
        "overload_refused_share": refused / max(sent, 1),
        "overload_unloaded_ms_p50": 1000 * unloaded,
        "overload_latency_over_unloaded": statistics.median(served) / unloaded,
        "overload_latency_over_unloaded_p99": float(np.quantile(served, 0.99)) / unloaded,
        "overload_memory_growth_mib": grown / 2**20,
        "overload_recovery_seconds": recovered,
    }


Part = Callable[[], Awaitable[dict[str, float]]]


def parts(quick: bool) -> dict[str, Part]:
    return {
        "streams": lambda: measure_streams(0.03, 64, 1 if quick else 3, 1 if quick else 4),
        "requests": lambda: measure_requests(3 if quick else 15, 32),
        "idle": lambda: measure_idle(200 if quick else 2000),
        "overload": lambda: measure_overload(5 if quick else 60),
    }


def main() -> int:
    parser = command_line(__doc__, "gateway")
    parser.add_argument("--quick", action="store_true", help="shorter, for a first look")
    parser.add_argument("--only", nargs="+", choices=list(parts(True)), default=list(parts(True)), help="some parts")
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pace", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(run_engine(options.engine, options.pace))
        return 0
    results: dict[str, Any] = {
        **heading(len(os.sched_getaffinity(0)), "fastapi", "uvicorn", "grpcio", "pydantic"),
        "load_before": round(os.getloadavg()[0], 2),
    }
    failed = False
    for name in options.only:
        start = time.monotonic()
        try:
            found = uvloop.run(asyncio.wait_for(parts(options.quick)[name](), _PART_SECONDS))
        except Exception as error:  # The other parts are still worth their numbers.
            failed, found = True, {}
            results[f"{name}_error"] = f"{type(error).__name__}: {error}"
        results |= {key: round(value, 4) for key, value in found.items()}
        print(f"{name} ({time.monotonic() - start:.0f} s)", json.dumps(found or results[f"{name}_error"], indent=2))
        write(results, options.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
