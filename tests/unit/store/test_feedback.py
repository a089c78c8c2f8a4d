"""Live feedback: stored once, stored for good, only by the tenant who asked."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from steersman.data.records import Feedback, Preference
from steersman.errors import ConflictError, InvalidArgumentError, NotFoundError
from steersman.store import Store
from steersman.store.feedback import Event, feedback_counts, feedback_rows, preference_rows, save_answer, submit
from steersman.store.models import Answer, FeedbackEvent

LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


def answer(key: str, customer: str = "acme", deployment: str = "champion") -> Answer:
    return Answer(
        id=key,
        customer=customer,
        deployment=deployment,
        model="bot-1",
        prompt=[{"role": "user", "content": "Where is my order?"}],
        answer="On its way.",
    )


@pytest.fixture
def answered(store: Store) -> Store:
    with store.transaction() as session:
        for key in ("a1", "a2", "a3"):
            save_answer(session, answer(key))
        save_answer(session, answer("b1", customer="bolt", deployment="candidate"))
    return store


def send(store: Store, event: Event, customer: str = "acme") -> bool:
    with store.transaction() as session:
        return submit(session, customer, event)


def test_an_event_is_counted_once(answered: Store) -> None:
    event = Event("e1", "a1", "thumbs", "down", "wrong order")
    assert [send(answered, event) for _ in range(3)] == [True, False, False]
    with answered.reading() as session:
        assert feedback_counts(session, "champion", LONG_AGO) == Counter({("thumbs", "down"): 1})
        assert session.scalar(sa.select(sa.func.count()).select_from(FeedbackEvent)) == 1


def test_an_event_id_cannot_change_its_meaning(answered: Store) -> None:
    send(answered, Event("e1", "a1", "thumbs", "down"))
    with pytest.raises(ConflictError, match="'e1' was stored with another judgement"):
        send(answered, Event("e1", "a1", "thumbs", "up"))
    # Another tenant's event ids are their own.
    assert send(answered, Event("e1", "b1", "thumbs", "up"), customer="bolt")


@pytest.mark.parametrize("answer_id", ["b1", "none"])
def test_somebody_elses_answer_does_not_exist(answered: Store, answer_id: str) -> None:
    with pytest.raises(NotFoundError, match=f"answer '{answer_id}' does not exist"):
        send(answered, Event("e1", answer_id, "thumbs", "up"))


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (Event("", "a1", "thumbs", "up"), "event_id"),
        (Event("e", "a1", "thumbs", "sideways"), "neither up nor down"),
        (Event("e", "a1", "edit", "  "), "empty"),
        (Event("e", "a1", "stars", "5"), "none of thumbs, edit, outcome"),  # type: ignore[arg-type]
        (Event("e", "a1", "outcome", "x" * 201), "at most 200"),
        (Event("e", "a1", "edit", "x" * 100_001), "longer than 100,000"),
    ],
)
def test_wrong_events_are_refused_with_the_field(answered: Store, event: Event, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        send(answered, event)


def test_the_same_event_from_many_threads_counts_once(answered: Store) -> None:
    created: list[bool] = []
    threads = [
        threading.Thread(target=lambda: created.append(send(answered, Event("e1", "a1", "thumbs", "up"))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 7 + [True]
    with answered.reading() as session:
        assert feedback_counts(session, "champion", LONG_AGO)["thumbs", "up"] == 1


def test_feedback_becomes_rows(answered: Store) -> None:
    for event in (
        Event("1", "a1", "thumbs", "up"),
        Event("2", "a1", "thumbs", "down"),
        Event("3", "a2", "outcome", "ticket_reopened"),
        Event("4", "a2", "outcome", "ticket_solved"),
        Event("5", "a3", "outcome", "invoice_sent"),
        Event("6", "a3", "edit", "first try"),
        Event("7", "a3", "edit", "It arrives on Monday."),
    ):
        send(answered, event)
    with answered.reading() as session:
        labelled = [Feedback.model_validate(row) for row in feedback_rows(session)]
        preferred = [Preference.model_validate(row) for row in preference_rows(session)]
    assert [(row.id, row.label, row.customer) for row in labelled] == [
        ("answer:a1", False, "acme"),
        ("answer:a2", False, "acme"),
    ]
    assert [row.chosen[0].content for row in preferred] == ["It arrives on Monday."]
    assert preferred[0].rejected[0].content == "On its way."


WRITER = """
import sys
from steersman.store import Store
from steersman.store.feedback import Event, Judge, submit
store = Store.open(sys.argv[1])
for number in range(100_000):
    with store.transaction() as session:
        submit(session, "acme", Event(f"e{number}", "a1", "thumbs", "up"), Judge(id=f"j{number}"))
    print(number, flush=True)  # the acknowledgement
"""


def test_acknowledged_means_stored_even_when_the_process_is_killed(answered: Store, store_url: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, store_url],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(25)]
    process.kill()  # SIGKILL, in the middle of whatever it does
    rest = process.stdout.read().split()
    process.wait()
    acknowledged += [int(number) for number in rest]
    with Store.open(store_url).reading() as session:
        stored = set(session.scalars(sa.select(FeedbackEvent.event_id)))
        counted = feedback_counts(session, "champion", LONG_AGO)["thumbs", "up"]
    assert {f"e{number}" for number in acknowledged} <= stored
    assert counted == len(stored) <= len(acknowledged) + 1
