"""Statistics, tasks and verdicts with a million judgements in the store.

    python benchmarks/bulk_judgements.py --judgements 1000000

Fills a store (SQLite, or PostgreSQL with --url) with a comparison project: 50 labelers, three judgements an item,
one item in twenty a honeypot, two months. Then measures what a page or a command does once: the agreement report, the
most disputed items, the next task, recording a verdict, undoing it, progress, live feedback counts. Medians and the
slowest of --repeat runs.
"""

from __future__ import annotations

import argparse
import datetime as dt
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa

from steersman.store import Store
from steersman.store.judging import (
    NewItem,
    NewJudgement,
    add_items,
    create_project,
    ensure_labeler,
    get_project,
    next_task,
    progress,
    record,
    record_many,
    undo,
)
from steersman.store.models import Item
from steersman.store.statistics import agreement_report, disputed_items
from steersman.store.verdicts import Verdict

LABELERS = 50
OVERLAP = 3
VERDICTS = [Verdict(ranking=ranking) for ranking in (((0,), (1,)), ((1,), (0,)), ((0, 1),))]
BATCH = 50_000


def fill(store: Store, judgements: int) -> None:
    """Adds the project, its items and the judgements in batches; a few items stay open."""
    items = judgements // OVERLAP
    with store.transaction() as session:
        project = create_project(session, "bulk", "compare", overlap=OVERLAP, honeypot_every=20)
        labelers = [ensure_labeler(session, f"labeler {number}").id for number in range(LABELERS)]
    for start in range(0, items + 1000, BATCH):
        with store.transaction() as session:
            add_items(session, project, (_item(n) for n in range(start, min(start + BATCH, items + 1000))))
    with store.reading() as session:
        ids = session.scalars(sa.select(Item.id).order_by(Item.id).limit(items)).all()
    for start in range(0, items, BATCH // OVERLAP):
        with store.transaction() as session:
            record_many(session, project, _judgements(list(ids[start : start + BATCH // OVERLAP]), labelers, start))
        print(f"\r{min(start * OVERLAP + BATCH, judgements):,} judgements", end="", flush=True)
    print()


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


def measure(name: str, action: Callable[[], object], repeat: int) -> None:
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    print(f"{name:<28} median {statistics.median(seconds) * 1000:8.1f} ms   slowest {max(seconds) * 1000:8.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgements", type=int, default=1_000_000)
    parser.add_argument("--url", help="database URL; a temporary SQLite file by default")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(arguments.url or f"sqlite:///{Path(folder, 'store.db')}")
        begin = time.perf_counter()
        fill(store, arguments.judgements)
        print(f"filled in {time.perf_counter() - begin:,.0f} s")
        with store.transaction() as session:
            project = get_project(session, "bulk")
            labeler = ensure_labeler(session, "labeler 7")

        def reading(function: Callable[..., object], *rest: object) -> Callable[[], object]:
            def call() -> object:
                with store.reading() as session:
                    return function(session, project, *rest)

            return call

        def judge() -> None:
            with store.transaction() as session:
                task = next_task(session, project, labeler)
                assert task is not None
                record(session, project, NewJudgement(task.item.id, labeler.id, VERDICTS[0], 3.0))

        def take_back() -> None:
            with store.transaction() as session:
                undo(session, project, labeler)

        report = reading(agreement_report)()
        print(report.questions)  # type: ignore[attr-defined]
        measure("agreement report", reading(agreement_report), arguments.repeat)
        measure("most disputed items", reading(disputed_items), arguments.repeat)
        measure("progress of a labeler", reading(progress, labeler), arguments.repeat)
        measure("next task and its verdict", judge, arguments.repeat)
        measure("undo", take_back, arguments.repeat)
        store.close()


if __name__ == "__main__":
    main()
