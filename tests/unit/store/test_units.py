"""One person is one voice: verdicts replace each other, caps hold, what is beyond them is shown."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
import sqlalchemy as sa

from steersman.errors import InvalidArgumentError, RateLimitedError
from steersman.store import Store, feedback
from steersman.store.feedback import Event, Judge, feedback_rows, preference_rows, save_answer, submit
from steersman.store.models import Answer, FeedbackEvent
from steersman.store.units import Caps, Units, anomalies, judged_units

LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
BROWSER = Judge("browser", origin="address-1")


def answer(store: Store, key: str, **fields: object) -> None:
    values = {"customer": "acme", "deployment": "champion", "consent": True} | fields
    with store.transaction() as session:
        save_answer(session, Answer(id=key, prompt=[{"role": "user", "content": key}], answer="No.", **values))


def thumb(store: Store, key: str, value: str, judge: Judge = BROWSER, tenant: str = "acme") -> None:
    with store.transaction() as session:
        number = session.scalar(sa.select(sa.func.count()).select_from(FeedbackEvent))
        submit(session, tenant, Event(f"e{number}", key, "thumbs", value), judge)


def units(store: Store, *deployments: str, since: dt.datetime = LONG_AGO, caps: Caps = Caps()) -> dict[str, Units]:
    with store.reading() as session:
        return judged_units(session, deployments or ("champion",), since, caps)


def test_four_hundred_events_of_one_browser_are_one_verdict(store: Store) -> None:
    answer(store, "a1")
    for _ in range(400):
        thumb(store, "a1", "down")
    assert units(store) == {"champion": Units(1, 1)}
    thumb(store, "a1", "up")
    assert units(store) == {"champion": Units(1, 0)}
    with store.reading() as session:
        (row,) = feedback_rows(session)
        assert session.scalar(sa.select(sa.func.count()).where(FeedbackEvent.current)) == 1
    assert row["label"] is True


def test_judges_do_not_replace_each_other_and_staff_decides_a_label(store: Store) -> None:
    answer(store, "a1")
    thumb(store, "a1", "up", Judge("staff", "ann"))
    thumb(store, "a1", "down")
    assert units(store) == {"champion": Units(1, 1)}
    with store.reading() as session:
        assert [row["label"] for row in feedback_rows(session)] == [True]


def test_a_conversation_is_one_unit_and_one_that_changed_its_variant_is_none(store: Store) -> None:
    for number in range(3):
        answer(store, f"a{number}", conversation_id="c1")
        thumb(store, f"a{number}", "down" if number == 1 else "up")
    answer(store, "b1", conversation_id="c2")
    answer(store, "b2", conversation_id="c2", deployment="candidate")  # not judged, and yet mixed
    thumb(store, "b1", "down")
    answer(store, "d1", conversation_id="c1", customer="bolt")  # another tenant's conversation of the same name
    thumb(store, "d1", "up", tenant="bolt")
    assert units(store, "champion", "candidate") == {"champion": Units(2, 1), "candidate": Units()}
    assert units(store, "champion")["champion"] == Units(3, 2), "nothing is mixed where only one is asked for"


def test_counts_begin_to_the_second(store: Store) -> None:
    moment = dt.datetime(2026, 5, 1, 10, 30, tzinfo=dt.UTC)
    answer(store, "a1", created_at=moment - dt.timedelta(seconds=1))
    answer(store, "a2", created_at=moment)
    thumb(store, "a1", "down")
    thumb(store, "a2", "up")
    assert units(store, since=moment) == {"champion": Units(1, 0)}


def test_customers_addresses_minutes_and_tenants_are_capped_and_shown(store: Store) -> None:
    for number in range(12):
        answer(store, f"a{number}")
        thumb(store, f"a{number}", "down", Judge("browser", origin="one"))
        answer(store, f"b{number}", end_customer="p1", conversation_id=f"c{number}")
        thumb(store, f"b{number}", "up", Judge("application", f"j{number}"))
        answer(store, f"d{number}", customer="bolt", end_customer=f"p{number}")
        thumb(store, f"d{number}", "up", Judge("application"), tenant="bolt")
    caps = Caps(end_customer=3, address=4, minute=100, tenant=9)
    assert units(store, caps=caps) == {"champion": Units(4 + 3 + 9, 4)}
    with store.reading() as session:
        shown = {(found.cap, found.whose): found.units for found in anomalies(session, ["champion"], LONG_AGO, caps)}
    assert shown == {("address", "one"): 8, ("end_customer", "acme/p1"): 9, ("tenant", "bolt"): 3}
    assert units(store, caps=Caps(minute=5, address=100))["champion"].bad <= 10, "two minutes at most"


def test_edits_of_browsers_are_preferred_answers_only_when_allowed(store: Store) -> None:
    answer(store, "a1")
    with store.transaction() as session:
        submit(session, "acme", Event("e1", "a1", "edit", "ARRR"), BROWSER)
    with store.reading() as session:
        assert list(preference_rows(session)) == []
        (row,) = preference_rows(session, browser_edits=True)
        assert row["chosen"][0]["content"] == "ARRR"
    with store.transaction() as session:
        submit(session, "acme", Event("e2", "a1", "edit", "Yes."), Judge("staff", "ann"))
    with store.reading() as session:
        assert [row["chosen"][0]["content"] for row in preference_rows(session)] == ["Yes."]


def test_who_was_not_asked_has_not_agreed(store: Store) -> None:
    for key, consent in (("a1", None), ("a2", False), ("a3", True)):
        answer(store, key, consent=consent)
        thumb(store, key, "up")
    with store.reading() as session:
        assert [row["consent"] for row in feedback_rows(session)] == [False, False, True]


def test_one_answer_takes_only_so_many_events(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MOST_EVENTS", 3)
    answer(store, "a1")
    for _ in range(3):
        thumb(store, "a1", "up")
    with pytest.raises(RateLimitedError, match="judged 3 times"):
        thumb(store, "a1", "down")
    with store.transaction() as session:
        assert not submit(session, "acme", Event("e0", "a1", "thumbs", "up"), BROWSER), "sent again, it is known"


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_what_no_database_can_store_is_refused_with_its_field(store: Store, text: str) -> None:
    answer(store, "a1")
    for event in (
        Event(text, "a1", "thumbs", "up"),
        Event("e", text, "thumbs", "up"),
        Event("e", "a1", "edit", text),
        Event("e", "a1", "thumbs", "up", reason=text),
    ):
        with pytest.raises(InvalidArgumentError, match="holds NUL or half a character"), store.transaction() as session:
            submit(session, "acme", event)


def test_an_old_database_keeps_its_last_verdicts(empty_url: str) -> None:
    """As it was before judges were known, with the gateway's tables made without a migration."""
    opened = Store.open(empty_url, migrate=False)
    opened.migrate("0001")
    with opened.transaction() as session:
        session.execute(
            sa.text(
                "CREATE TABLE gateway_idempotency (scope VARCHAR(400), key VARCHAR(255), request_digest VARCHAR(64),"
                " result TEXT, expires_at TIMESTAMP, PRIMARY KEY (scope, key))"
            )
        )
        session.execute(
            sa.text(
                "INSERT INTO answers (id, customer, deployment, model, weights_version, prompt, answer, created_at)"
                " VALUES ('a1', 'acme', 'champion', '', '', '[]', 'No.', '2026-01-01 00:00:00')"
            )
        )
        for number, value in enumerate(("up", "down")):
            session.execute(
                sa.text(
                    "INSERT INTO feedback_events (customer, event_id, answer_id, kind, value, reason, received_at)"
                    f" VALUES ('acme', 'e{number}', 'a1', 'thumbs', '{value}', '', '2026-01-01 00:00:00')"
                )
            )
    opened.migrate()
    assert units(opened) == {"champion": Units(1, 1)}
    columns = {column["name"] for column in sa.inspect(opened.engine).get_columns("gateway_idempotency")}
    assert {"owner", "tenant", "customer"} <= columns
    opened.close()


def test_sqlite_files_are_for_their_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    file.touch(0o644)
    opened = Store.open(f"sqlite:///{file}")
    answer(opened, "a1")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600}
    opened.close()
