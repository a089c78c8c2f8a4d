"""Migrations beside gateways that go on."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from steersman.store import Store
from steersman.store.judging import create_project

SEEN = sa.text("SELECT query FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'")


@pytest.fixture
def store_at(request: pytest.FixtureRequest, empty_url: str) -> Iterator[Store]:
    if empty_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    store = Store.open(empty_url, migrate=False)
    store.migrate(request.param)
    yield store
    store.close()


ADD = sa.text(
    "INSERT INTO items (project_id, key, prompt, candidates, meta, honeypot, open_slots, judgements, place)"
    " SELECT id, :key, '[]', '[]', '{}', false, 3, 0, 0 FROM projects"
)


@pytest.mark.parametrize("store_at", ["0008"], indirect=True)
def test_others_write_while_an_index_is_built(store_at: Store) -> None:
    store = store_at
    with store.transaction() as session:
        create_project(session, "p", "compare")
    # A writer that takes long: the build waits for it, and nobody may wait for the build.
    slow = store.engine.connect()
    slow.execute(sa.text("UPDATE projects SET guidelines = 'new'"))
    slow.execute(ADD, {"key": "slow"})
    errors: list[BaseException] = []

    def migrate() -> None:
        try:
            store.migrate()
        except BaseException as error:
            errors.append(error)

    both = [threading.Thread(target=migrate) for _ in range(2)]
    for thread in both:
        thread.start()
    deadline = time.monotonic() + 60
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
        while not any("CREATE INDEX" in query for query in watching.scalars(SEEN)):
            assert time.monotonic() < deadline
            assert not errors
            time.sleep(0.02)
    for number in range(3):
        with store.transaction() as session:
            session.execute(sa.text("SET LOCAL lock_timeout = '10s'"))
            session.execute(ADD, {"key": f"beside {number}"})
    assert all(thread.is_alive() for thread in both)
    slow.commit()
    slow.close()
    for thread in both:
        thread.join(60)
    assert errors == []
    with store.engine.connect() as connection:
        invalid = connection.scalars(sa.text("SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid")).all()
        indexes = {index["name"] for index in sa.inspect(connection).get_indexes("items")}
        assert connection.scalar(sa.text("SELECT count(*) FROM items")) == 4
    assert invalid == []
    assert {"ix_items_all", "ix_items_open"} <= indexes


@pytest.mark.parametrize("store_at", ["0005"], indirect=True)
def test_every_later_index_is_built_beside_writers_and_after_a_build_that_was_broken_off(store_at: Store) -> None:
    store, built = store_at, []
    there = set(sa.inspect(store.engine).get_table_names())

    @sa.event.listens_for(store.engine, "before_cursor_execute")
    def _(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if (made := re.match(r"CREATE (UNIQUE )?INDEX.* ON (\w+)", statement)) and made[2] in there:
            built.append(statement)

    with store.engine.begin() as connection:  # what a build leaves that was broken off has the name
        connection.execute(sa.text("CREATE INDEX ix_items_open ON items (key)"))
        connection.execute(
            sa.text("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_items_open'::regclass")
        )
    built.clear()
    store.migrate()
    assert len(built) > 8
    assert all("CONCURRENTLY" in statement for statement in built), built
    with store.engine.connect() as connection:
        assert connection.scalars(sa.text("SELECT 1 FROM pg_index WHERE NOT indisvalid")).all() == []
