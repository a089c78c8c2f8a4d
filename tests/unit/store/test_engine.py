"""Opening and migrating the store."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from steersman.errors import ConfigError, UnavailableError
from steersman.store import Store
from steersman.store.models import Base, Labeler


@pytest.mark.filterwarnings("ignore:.*expression-based index")  # of SQLite; PostgreSQL's are compared
def test_migrations_make_exactly_the_tables_of_the_models(store: Store) -> None:
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"target_metadata": Base.metadata, "compare_type": True})
        differences = compare_metadata(context, Base.metadata)
    assert [entry for entry in differences if "alembic_version" not in str(entry)] == []


def test_what_goes_with_its_owner_is_found_by_an_index(store: Store) -> None:
    """Deleting an owner looks for its rows: without an index over all of them, in the whole table for each owner."""
    missing = []
    for table in Base.metadata.sorted_tables:
        whole = [index for index in table.indexes if index.dialect_options["sqlite"]["where"] is None]
        led_by = {next(iter(columns.columns)).name for columns in [table.primary_key, *whole]}
        for key in table.foreign_keys:
            if key.ondelete == "CASCADE" and key.parent.name not in led_by:
                missing.append(f"{table.name}.{key.parent.name}")
    assert missing == []


def test_migrations_go_down_and_up_again(store: Store) -> None:
    def tables() -> set[str]:
        return set(sa.inspect(store.engine).get_table_names()) - {"alembic_version"}

    made = tables()
    assert made == {table.name for table in Base.metadata.sorted_tables}
    store.migrate("base")
    assert tables() == set()
    store.migrate()
    assert tables() == made


def test_opening_twice_and_at_once_is_fine(empty_url: str) -> None:
    errors: list[BaseException] = []

    def open_it() -> None:
        try:
            Store.open(empty_url).close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    Store.open(empty_url).close()


def test_a_failed_block_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.transaction() as session:  # noqa: PT012
        session.add(Labeler(name="ann"))
        session.flush()
        raise RuntimeError
    with store.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Labeler)) == 0


def test_sqlite_is_in_wal_mode_with_synced_commits_and_foreign_keys(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path / 'new' / 'store.db'}")
    with store.engine.connect() as connection:
        values = [connection.execute(sa.text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
        assert values == ["wal", 2]
        assert connection.execute(sa.text("PRAGMA foreign_keys")).scalar() == 1


def test_a_url_that_is_none_and_a_server_that_is_not_there_are_named() -> None:
    with pytest.raises(ConfigError, match="no database URL"):
        Store.open("nonsense")
    with pytest.raises(UnavailableError, match=r"\*\*\*@localhost:1/"):
        Store.open("postgresql://me:secret@localhost:1/feedback")
