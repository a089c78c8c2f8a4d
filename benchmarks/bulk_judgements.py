"""Pages and statistics with a million judgements in the store.

    python -m benchmarks.bulk_judgements --judgements 1000000

Fills a store (SQLite, or PostgreSQL with --url) with a comparison project: 50 labelers, three judgements an item, one
item in twenty a honeypot, two months, and 100,000 items that are still open. Then measures what people wait for: the
pages over HTTP from a running gateway (projects, task, a verdict with the next task, undo, agreement) and the figures
that the command line shows. Prints the median and the slowest of --repeat runs and writes
build/bench/bulk_judgements.json. Target: each below one second.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import re
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import sqlalchemy as sa

from benchmarks.report import command_line, heading, write
from services.gateway.testing import gateway_config, running_gateway
from steersman.store import Store
from steersman.store.judging import (
    NewItem,
    NewJudgement,
    add_items,
    create_project,
    ensure_labeler,
    get_project,
    record_many,
)
from steersman.store.models import Item
from steersman.store.statistics import agreement_report, disputed_items
from steersman.store.verdicts import Verdict

LABELERS = 50
OVERLAP = 3
OPEN_ITEMS = 100_000
VERDICTS = [Verdict(ranking=ranking) for ranking in (((0,), (1,)), ((1,), (0,)), ((0, 1),))]
BATCH = 60_000


def fill(store: Store, judgements: int) -> int:
    """Adds the project, its items and the judgements in batches; returns the project's id."""
    judged = judgements // OVERLAP
    items = judged + min(OPEN_ITEMS, judged)
    with store.transaction() as session:
        project = create_project(session, "bulk", "compare", overlap=OVERLAP, honeypot_every=20)
        labelers = [ensure_labeler(session, f"labeler {number}").id for number in range(LABELERS)]
    for start in range(0, items, BATCH):
        with store.transaction() as session:
            add_items(session, project, (_item(n) for n in range(start, min(start + BATCH, items))))
    with store.reading() as session:
        ids = session.scalars(sa.select(Item.id).order_by(Item.id).limit(judged)).all()
    for start in range(0, judged, BATCH // OVERLAP):
        with store.transaction() as session:
            record_many(session, project, _judgements(list(ids[start : start + BATCH // OVERLAP]), labelers, start))
        print(f"\r{min(start * OVERLAP + BATCH, judgements):,} judgements", end="", flush=True)
    print()
    return project.id


def _item(number: int) -> NewItem:
    answers = [{"messages": [{"role": "assistant", "content": f"answer {side} to {number}"}]} for side in "ab"]
    expected = VERDICTS[0] if number % 20 == 19 else None
    return NewItem(f"{number}", [{"role": "user", "content": f"question {number}"}], answers, expected=expected)


def _judgements(ids: list[int], labelers: list[int], seed: int) -> Iterator[NewJudgement]:
    draw = random.Random(seed)
    begin = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    for item_id in ids:
        usual = draw.randrange(3)
        for labeler in draw.sample(labelers, OVERLAP):
            verdict = VERDICTS[usual if draw.random() < 0.8 else draw.randrange(3)]
            at = begin + dt.timedelta(minutes=draw.randrange(60 * 24 * 60))
            yield NewJudgement(
                item_id, labeler, verdict, draw.uniform(2, 30), f"{item_id}:{labeler}", (0, 1), created_at=at
            )


class Clock:
    """Times actions by name."""

    def __init__(self, repeat: int) -> None:
        self._repeat = repeat
        self.figures: dict[str, float] = {}

    async def measure(self, name: str, action: Callable[[], Awaitable[object]]) -> None:
        await action()  # the first call imports libraries
        seconds = []
        for _ in range(self._repeat):
            begin = time.perf_counter()
            await action()
            seconds.append(time.perf_counter() - begin)
        self.figures |= {f"{name} median_s": statistics.median(seconds), f"{name} slowest_s": max(seconds)}
        print(f"{name:<28} median {statistics.median(seconds) * 1000:8.1f} ms   slowest {max(seconds) * 1000:8.1f} ms")


async def measure_pages(clock: Clock, url: str, project_id: int) -> None:
    """What a labeler with a fiftieth of the judgements, and the operator, wait for in the browser."""
    # No answer is asked for, so the policy service need not be there.
    async with (
        running_gateway(gateway_config("127.0.0.1:1", database=url)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=600, follow_redirects=True) as http,
    ):
        (await http.post("/login", data={"name": "labeler 7", "next": "/label"})).raise_for_status()
        task = f"/label/{project_id}"

        async def get(path: str) -> str:
            response = await http.get(path)
            response.raise_for_status()
            return response.text

        async def judge() -> None:
            fields = dict(re.findall(r'name="(item_id|event_id|shown_at)" value="([^"]+)"', await get(task)))
            (await http.post(task, data={**fields, "choice": "left:2"})).raise_for_status()

        async def undo() -> None:
            (await http.post(f"{task}/undo", data={"_": ""})).raise_for_status()

        await clock.measure("page of the projects", lambda: get("/label"))
        await clock.measure("page of a task", lambda: get(task))
        await clock.measure("task, verdict, next task", judge)
        await clock.measure("undo and the task again", undo)
        await clock.measure("page of the agreement", lambda: get(f"{task}/agreement"))


async def measure_figures(clock: Clock, store: Store) -> None:
    """What `steersman data agreement` computes."""

    def call(function: Callable[..., object]) -> Callable[[], Awaitable[object]]:
        async def run() -> object:
            with store.reading() as session:
                return function(session, get_project(session, "bulk"))

        return run

    await clock.measure("agreement report", call(agreement_report))
    await clock.measure("most disputed items", call(disputed_items))


async def run(judgements: int, url: str, repeat: int) -> dict[str, float]:
    store = Store.open(url)
    begin = time.perf_counter()
    project_id = fill(store, judgements)
    clock = Clock(repeat)
    clock.figures |= {"judgements": judgements, "filled in_s": time.perf_counter() - begin}
    print(f"filled in {clock.figures['filled in_s']:,.0f} s")
    await measure_figures(clock, store)
    await measure_pages(clock, url, project_id)
    store.close()
    return clock.figures


def main() -> None:
    parser = command_line(__doc__, "bulk_judgements")
    parser.add_argument("--judgements", type=int, default=1_000_000)
    parser.add_argument("--url", help="database URL; a temporary SQLite file by default")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.url or f"sqlite:///{Path(folder, 'store.db')}"
        figures = asyncio.run(run(arguments.judgements, url, arguments.repeat))
    write(
        heading(1, "sqlalchemy", "fastapi") | {name: round(value, 4) for name, value in figures.items()}, arguments.out
    )


if __name__ == "__main__":
    main()
