"""Every class of database error is decided, by real errors where they can be had."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from steersman.errors import UnavailableError
from steersman.store import Store
from steersman.store.failures import decide
from steersman.store.models import Labeler


def of_postgresql(state: str) -> sa.exc.DBAPIError:
    original = psycopg.errors.lookup(state)("said so")
    return sa.exc.DBAPIError("statement", {}, original)


@pytest.mark.parametrize(
    ("state", "decision"),
    [
        ("25006", "wait"),  # read-only: a failover
        ("08006", "wait"), ("57P01", "wait"), ("57P03", "wait"), ("53100", "wait"), ("53300", "wait"),
        ("58030", "wait"), ("28P01", "wait"), ("3D000", "wait"), ("42P01", "wait"), ("XX000", "wait"),
        ("40001", "retry"), ("40P01", "retry"), ("55P03", "retry"), ("57014", "retry"),
        ("22021", "refuse"), ("22001", "refuse"), ("23505", "refuse"), ("42601", "refuse"), ("54000", "refuse"),
    ],
)  # fmt: skip
def test_states_of_postgresql(state: str, decision: str) -> None:
    assert decide(of_postgresql(state)) == decision


def test_every_state_that_the_driver_knows_is_decided() -> None:
    classes = {state[:2] for state in psycopg.errors._sqlcodes}
    assert {decide(of_postgresql(state)) for state in psycopg.errors._sqlcodes} == {"retry", "wait", "refuse"}
    assert {"08", "23", "53", "57"} <= classes


def test_other_errors() -> None:
    assert decide(sa.exc.TimeoutError("QueuePool limit")) == "wait"
    assert decide(OSError("no space left")) == "wait"
    assert decide(sa.exc.OperationalError("connect", {}, psycopg.OperationalError("refused"))) == "wait"
    assert decide(sa.exc.StatementError("bad parameter", "insert", {}, ValueError())) == "refuse"
    assert decide(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates")) == "refuse"


def test_sqlite_that_is_read_only_waits_and_that_refuses_refuses(tmp_path: Path) -> None:
    Store.open(f"sqlite:///{tmp_path}/s.db").close()
    reading = Store(sa.create_engine(f"sqlite:///file:{tmp_path}/s.db?mode=ro&uri=true"))
    with pytest.raises(UnavailableError, match="reached or written"), reading.transaction() as session:
        session.add(Labeler(name="ann"))
    writing = Store.open(f"sqlite:///{tmp_path}/s.db")
    with writing.transaction() as session:
        session.add(Labeler(name="ann"))
    with pytest.raises(sa.exc.IntegrityError), writing.transaction() as session:
        session.add(Labeler(name="ann"))
    with sqlite3.connect(tmp_path / "s.db") as raw:
        raw.execute("DROP TABLE labelers")
    with pytest.raises(UnavailableError), writing.transaction() as session:
        session.add(Labeler(name="bob"))


def test_a_postgresql_that_became_read_only_waits(postgres_url: str) -> None:
    url = sa.make_url(postgres_url).set(drivername="postgresql+psycopg")
    store = Store(sa.create_engine(url))
    switch(store, "on")
    try:
        with pytest.raises(UnavailableError, match="read-only"):
            store.check_writable()
        with pytest.raises(UnavailableError), store.transaction() as session:
            session.execute(sa.text("CREATE TABLE never (id int)"))
    finally:
        switch(store, "off")
    store.check_writable()
    store.close()


def switch(store: Store, value: str) -> None:
    """Makes every transaction of the server read-only, as on a standby."""
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("SET default_transaction_read_only = off"))
        connection.execute(sa.text(f"ALTER SYSTEM SET default_transaction_read_only = {value}"))
        connection.execute(sa.text("SELECT pg_reload_conf()"))
        connection.execute(sa.text("SELECT pg_sleep(0.2)"))
    store.engine.dispose()


def test_a_server_that_vanished_is_given_up_within_half_a_minute(postgres_url: str) -> None:
    """Its machine lost power: nobody resets the connection, and whoever waits for an answer would wait for hours."""
    for url, seconds in ((postgres_url, "10"), (f"{postgres_url}&keepalives_idle=77", "77")):
        store = Store.open(url, migrate=False)
        with store.engine.connect() as connection:
            found = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
        assert (found["keepalives_idle"], found["keepalives_count"]) == (seconds, "3")
        store.close()
