"""A year of data: is what people wait for still there in time, and what grows with the data no faster than the data?

Fills a store with answers (one in ten judged), their lines of the audit trail and judgements of labellers, first a
quarter, then all of it, and times the same work at both sizes. `growth` is the ratio of the two times, with SQLite of
the processor's. Work on one record or page must stay near 1, work on everything (a release, an erasure from all of
them) near 4; half as much again is bad, where it takes more than NOTICED seconds, and so is a page of more than
PAGE_SECONDS.
"""

from __future__ import annotations

import datetime as dt
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from benchmarks.bulk_judgements import LABELERS, OVERLAP, VERDICTS
from steersman.data.rules import ReleaseOptions
from steersman.errors import InvalidArgumentError
from steersman.store import Store
from steersman.store.feedback import Event, submit
from steersman.store.handing import next_task, progress
from steersman.store.items import NewItem, add_items
from steersman.store.judging import NewJudgement, create_project, ensure_labeler, get_project, record, record_many
from steersman.store.managing import find_items
from steersman.store.models import Answer, FeedbackEvent, Item
from steersman.store.releases import Subject, delete_customer, publish
from steersman.store.serving import Audit
from steersman.store.statistics import agreement_report, disputed_items

BATCH = 20_000
TENANTS = 20
PEOPLE = 20_000
"""End customers; each asks as often as every other."""
JUDGED = 10
"""One answer in so many has feedback."""
WHOLE = ("release", "erasure", "page: agreement")
"""Work on everything; an erasure writes the releases that hold somebody anew."""
FEWEST = (2000, 1500)
"""Answers and judgements; with fewer a quarter has not what is judged while the clock runs."""
NOTICED = 0.25
PAGE_SECONDS = 2.0
SLACK = 1.5
NOW = dt.datetime.now(dt.UTC)


# -- filling -----------------------------------------------------------------------------------------------------------


def add_answers(store: Store, first: int, last: int, total: int) -> None:
    """Answers number `first` to `last` of `total`, over a year; newest first, so that a day is always as full."""
    for start in range(first, last, BATCH):
        numbers = range(start, min(start + BATCH, last))
        with store.transaction() as session:
            session.execute(sa.insert(Answer), [_answer(number, total) for number in numbers])
            session.execute(sa.insert(Audit), [_line(number, total) for number in numbers])
            judged = [number for number in numbers if number % JUDGED == 0]
            session.execute(sa.insert(FeedbackEvent), [_thumb(number, total) for number in judged])


def _at(number: int, total: int) -> dt.datetime:
    return NOW - dt.timedelta(days=365) * (number / total)


def _who(number: int) -> tuple[str, str]:
    person = number % PEOPLE
    return f"tenant {person % TENANTS}", f"person {person}"


def _answer(number: int, total: int) -> dict[str, Any]:
    tenant, person = _who(number)
    return {
        "id": f"a{number}",
        "conversation_id": f"c{number // 3}",
        "customer": tenant,
        "end_customer": person,
        "deployment": "champion",
        "weights_version": str(number * 50 // total),
        "prompt": [{"role": "user", "content": f"Where is order {number}? It was promised for this week."}],
        "answer": f"Order {number} is on its way and will be with you tomorrow.",
        "consent": True,
        "created_at": _at(number, total),
    }


def _line(number: int, total: int) -> dict[str, Any]:
    tenant, person = _who(number)
    return {
        "at": _at(number, total),
        "request_id": f"r{number}",
        "action": "answer",
        "outcome": "stop",
        "tenant": tenant,
        "key_id": "k",
        "customer": person,
        "answer_id": f"a{number}",
        "prompt_tokens": 20,
        "completion_tokens": 14,
        "milliseconds": 400,
        "first_token_milliseconds": 60,
    }


def _thumb(number: int, total: int) -> dict[str, Any]:
    tenant, person = _who(number)
    return {
        "customer": tenant,
        "event_id": f"e{number}",
        "answer_id": f"a{number}",
        "kind": "thumbs",
        "value": "down" if number % 7 == 0 else "up",
        "judge": person,
        "received_at": _at(number, total),
    }


def add_judgements(store: Store, first: int, last: int) -> None:
    """Items number `first` to `last`, each judged by OVERLAP labellers; one in five stays open."""
    for start in range(first, last, BATCH // OVERLAP):
        with store.transaction() as session:
            project = get_project(session, "year")
            labelers = [ensure_labeler(session, f"labeler {number}").id for number in range(LABELERS)]
            numbers = range(start, min(start + BATCH // OVERLAP, last))
            add_items(session, project, (_item(number) for number in numbers))
            # The spare ones, with numbers below 0, are never judged.
            add_items(session, project, (_item(-1 - number) for number in numbers if number % 5 == 0))
            keys = [str(number) for number in numbers]
            ids = session.scalars(sa.select(Item.id).where(Item.project_id == project.id, Item.key.in_(keys))).all()
            record_many(session, project, _verdicts(list(ids), labelers))


def _item(number: int) -> NewItem:
    tenant, person = _who(number)
    answers = [{"messages": [{"role": "assistant", "content": f"answer {side} to {number}"}]} for side in "ab"]
    prompt = [{"role": "user", "content": f"question {number}"}]
    return NewItem(str(number), prompt, answers, customer=tenant, consent=True, meta={"end_customer": person})


def _verdicts(ids: list[int], labelers: list[int]) -> Iterator[NewJudgement]:
    for item in ids:
        for index in range(OVERLAP):
            labeler = labelers[(item * 7 + index * 11) % LABELERS]
            verdict = VERDICTS[item % 3 if (item + index) % 5 else (item + 1) % 3]
            at = NOW - dt.timedelta(minutes=item % 500_000)
            yield NewJudgement(item, labeler, verdict, 8.0, f"{item}:{labeler}", (0, 1), created_at=at)


# -- what is timed -----------------------------------------------------------------------------------------------------


class Timed:
    """Seconds by piece of work, at one size of the data."""

    def __init__(self, store: Store, folder: Path, answers: int, mark: str) -> None:
        self._store, self._folder, self._answers, self._mark = store, folder, answers, mark
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        """Of this thread, in which SQLite works too."""

    def _time(self, name: str, work: Callable[[], object], repeat: int = 5) -> None:
        taken, computed = [], []
        for _ in range(repeat):
            began, began_computing = time.perf_counter(), time.thread_time()
            work()
            taken.append(time.perf_counter() - began)
            computed.append(time.thread_time() - began_computing)
        self.seconds[name], self.cpu[name] = statistics.median(taken), statistics.median(computed)
        print(f"load  {self._answers:>11,} answers  {name:<34} {self.seconds[name]:9.4f} s", flush=True)

    def _read(self, name: str, work: Callable[[Session], object], repeat: int = 5) -> None:
        def run() -> None:
            with self._store.reading() as session:
                work(session)

        self._time(name, run, repeat)

    def _write(self, name: str, work: Callable[[Session], object], repeat: int = 5) -> None:
        def run() -> None:
            with self._store.transaction() as session:
                work(session)

        self._time(name, run, repeat)

    def pages(self) -> None:
        from services.gateway.pages.figures import SPANS, operator_figures

        def project_work(function: Callable[..., object], **options: Any) -> Callable[[Session], object]:
            return lambda session: function(session, get_project(session, "year"), **options)

        day = SPANS["24h"]
        self._read("page: operator", lambda session: operator_figures(session, day, dt.datetime.now(dt.UTC)))
        self._read("page: agreement", project_work(agreement_report))
        self._read("page: disputed items", project_work(disputed_items))
        self._read("page: items", project_work(find_items))
        self._read("page: items, the hundredth", project_work(find_items, after=(0.0, 5000)))
        self._read("page: items, open", project_work(find_items, state="open"))

    def work(self) -> None:
        numbers = itertools.count(1)

        def thumb(session: Session) -> None:
            number = next(numbers) * TENANTS + 1  # of tenant 1, which stays, and not judged yet
            submit(session, _who(number)[0], Event(f"{self._mark}{number}", f"a{number}", "thumbs", "up"))

        def judge(session: Session) -> None:
            project = get_project(session, "year")
            labeler = ensure_labeler(session, "labeler 3")
            task = next_task(session, project, labeler)
            assert task is not None
            record(session, project, NewJudgement(task.item.id, labeler.id, VERDICTS[0], 3.0))
            progress(session, project, labeler)

        self._write("feedback on an answer", thumb, repeat=20)
        self._write("task, verdict, progress", judge, repeat=20)

    def everything(self) -> None:
        """Releases and erasures; what is erased is a person's or a tenant's equal share of the data."""
        for name, kind, source in (("feedback", "feedback", "feedback"), ("judged", "preference", "project:year")):
            release = ReleaseOptions(name=name, kind=kind, sources=(source,))  # type: ignore[arg-type]
            self._time(f"release: {name}", partial(publish, self._store, release, self._folder), 1)
        person = Subject("tenant 7", f"person {7 if self._mark == 'q' else 27}")
        self._time("erasure of a person", lambda: delete_customer(self._store, person), 1)
        tenant = "tenant 11" if self._mark == "q" else "tenant 12"
        self._time("erasure of a tenant", lambda: delete_customer(self._store, tenant), 1)


def run(answers: int, judgements: int, url: str | None = None) -> dict[str, Any]:
    """Times both sizes; `bad` names what grows faster than it may."""
    if answers < FEWEST[0] or judgements < FEWEST[1]:
        raise InvalidArgumentError("--answers, --judgements: give at least {:,} and {:,}".format(*FEWEST))
    with tempfile.TemporaryDirectory(prefix="load-year-") as name:
        folder = Path(name)
        store = Store.open(url or f"sqlite:///{folder}/year.db")
        with store.transaction() as session:
            create_project(session, "year", "compare", overlap=OVERLAP)
        sizes = (answers // 4, answers)
        found, filled, before, began = [], [], (0, 0), 0.0
        for size, mark in zip(sizes, "qa", strict=True):
            items = judgements * size // answers // OVERLAP
            began = time.perf_counter()
            add_answers(store, before[0], size, answers)
            add_judgements(store, before[1], items)
            filled.append(time.perf_counter() - began)
            before = (size, items)
            timed = Timed(store, folder / mark, size, mark)
            timed.pages()
            timed.work()
            timed.everything()
            found.append(timed)
        sqlite = store.engine.dialect.name == "sqlite"
        store.close()
    quarter, whole = found
    operations = {}
    for name in whole.seconds:
        # Beside a busy machine's other work, its own computing says more than the clock.
        less, more = (timed.cpu[name] if sqlite else timed.seconds[name] for timed in found)
        operations[name] = {
            "quarter_seconds": quarter.seconds[name],
            "seconds": whole.seconds[name],
            "counted_seconds": more,
            "growth": more / max(less, 1e-4),
        }
    return {
        "answers": answers, "judgements": judgements, "filled_seconds": sum(filled), "operations": operations,
        "bad": [words for name, one in operations.items() for words in _bad(name, one)],
    }  # fmt: skip


def _bad(name: str, one: dict[str, float]) -> list[str]:
    most = (4.0 if name.startswith(WHOLE) else 1.0) * SLACK
    words = []
    if one["growth"] > most and one["counted_seconds"] > NOTICED:
        words.append(f"{name}: {one['growth']:.1f} times as long for four times the data")
    if name.startswith("page: ") and one["counted_seconds"] > PAGE_SECONDS:
        words.append(f"{name}: takes {one['counted_seconds']:.1f} s")
    return words
