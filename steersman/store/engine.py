"""Opening the store: SQLite in WAL mode by default, PostgreSQL in a cluster, migrated on opening."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from steersman.errors import ConfigError, StorageError, UnavailableError
from steersman.store.failures import decide
from steersman.store.models import Base

_BUSY_SECONDS = 30
_MIGRATING = 7335732783
"""The lock's number, at PostgreSQL."""
_BRIEF = sa.text("SET LOCAL idle_in_transaction_session_timeout = '10s'")
_VANISHED = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
             "tcp_user_timeout": 30_000}  # fmt: skip
"""libpq's parameters: a server that is not heard of any more is given up within half a minute, not two hours."""
_AWAY = "The database cannot be reached or written; try again later"


class Store:
    """A database with the tables of `steersman.store.models`. Safe to share between threads."""

    def __init__(self, engine: sa.Engine, *, brief: bool = False) -> None:
        self.engine = engine
        self._brief = brief and engine.dialect.name == "postgresql"

    @classmethod
    def open(cls, url: str = "sqlite:///steersman.db", *, migrate: bool = True, brief: bool = False) -> Store:
        """Opens a database URL and brings its tables up to date.

        `brief`: its transactions do nothing else for long. PostgreSQL soon ends one whose process stands still, or is
        not heard of any more, so that others do not wait for its locks.

        Raises ConfigError for a URL that is none, UnavailableError when the database cannot be reached.
        """
        try:
            parsed = sa.make_url(url)
        except sa.exc.ArgumentError:
            raise ConfigError(
                f"store: {url!r} is no database URL; use sqlite:///FILE or postgresql+psycopg://"
            ) from None
        if parsed.drivername in ("postgres", "postgresql"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.drivername.startswith("sqlite") and parsed.database and parsed.database != ":memory:":
            _make_private(Path(parsed.database).resolve())
        arguments = {}
        if parsed.drivername.startswith("postgresql"):
            arguments = {name: value for name, value in _VANISHED.items() if name not in parsed.query}
        engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=arguments)
        if engine.dialect.name == "sqlite":
            _use_wal(engine)
        store = cls(engine, brief=brief)
        if migrate:
            try:
                store.migrate()
            except sa.exc.DBAPIError as error:
                if decide(error) == "refuse":
                    raise
                shown = parsed.render_as_string(hide_password=True)
                raise UnavailableError(f"store {shown}: cannot be opened ({error.orig})") from error
        return store

    def migrate(self, revision: str = "head") -> None:
        """Runs the migrations that this database lacks; two processes may do so at once.

        Args:
            revision: "head", or one to go up or down to; "base" takes every table down with all that is in it.
        """
        from alembic import command
        from alembic.config import Config
        from alembic.migration import MigrationContext
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self._migrating() as connection:
            config.attributes["connection"] = connection
            current = MigrationContext.configure(connection).get_current_revision()
            if self.engine.dialect.name == "postgresql":
                connection.rollback()  # each migration has a transaction of its own
            passed = ScriptDirectory.from_config(config).iterate_revisions(current, "base") if current else ()
            down = revision in ("base", *(one.revision for one in passed))
            (command.downgrade if down else command.upgrade)(config, revision)

    @contextmanager
    def _migrating(self) -> Iterator[sa.Connection]:
        """A connection, for one process at a time. On SQLite all is one transaction."""
        if self.engine.dialect.name != "postgresql":
            with self.engine.connect().execution_options(steersman_write=True) as connection, connection.begin():
                yield connection
            return
        # The lock is a session's: an index that is built beside writers needs to be outside of transactions. It is
        # asked for again and again: the build waits for all transactions, that of a statement that waits included.
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as lock:
            while not lock.scalar(sa.text(f"SELECT pg_try_advisory_lock({_MIGRATING})")):
                time.sleep(0.1)
            try:
                with self.engine.connect() as connection:
                    yield connection
            finally:
                lock.execute(sa.text(f"SELECT pg_advisory_unlock({_MIGRATING})"))

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that commits at the end of the block: when the block is left, the data is on disk."""
        engine = self.engine.execution_options(steersman_write=True)
        with self._translated(), Session(engine, expire_on_commit=False) as session, session.begin():
            if self._brief:
                session.execute(_BRIEF)
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that changes nothing and sees one state of the data, beside any writers."""
        engine = self.engine
        if engine.dialect.name == "postgresql":
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        with self._translated(), Session(engine, expire_on_commit=False) as session:
            yield session

    def check_writable(self) -> None:
        """Raises UnavailableError while nothing can be stored."""
        with self.transaction() as session:
            if (
                self.engine.dialect.name == "postgresql"
                and session.scalar(sa.text("SHOW transaction_read_only")) == "on"
            ):
                self.engine.dispose()
                raise UnavailableError(f"{_AWAY} (it is read-only)")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors that pass by themselves become UnavailableError; what the database refuses stays as it is."""
        try:
            yield
        except (sa.exc.SQLAlchemyError, OSError) as error:
            if decide(error) == "refuse":
                raise
            if getattr(getattr(error, "orig", None), "sqlstate", None) == "25006":
                # Connections to a server that was demoted stay open; a new one finds the new primary.
                self.engine.dispose()
            raise UnavailableError(f"{_AWAY} ({type(error).__name__})") from error

    def close(self) -> None:
        self.engine.dispose()


def _make_private(file: Path) -> None:
    """A SQLite file that only its owner can read; SQLite gives its -wal and -shm the same mode."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        for path in (file, *(file.with_name(f"{file.name}{end}") for end in ("-wal", "-shm", "-journal"))):
            if path.exists() and path.stat().st_mode & 0o077 and path.stat().st_uid == os.geteuid():
                path.chmod(0o600)
    except OSError as error:
        raise StorageError(f"store {file}: cannot be opened ({error.strerror})") from None


def _use_wal(engine: sa.Engine) -> None:
    """Write-ahead log, every commit synced, writers queue up at BEGIN instead of failing in the middle."""

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's begin event below sends BEGIN, not the driver
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {_BUSY_SECONDS * 1000}",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("steersman_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def add_counts(session: Session, model: type[Base], deltas: Mapping[tuple[Any, ...], tuple[float, ...]]) -> None:
    """Adds to the count columns of `model` at each primary key, making rows as needed.

    Args:
        session: A writing session.
        model: A table whose columns are its primary key, then its counts.
        deltas: Primary key -> one delta for each count column, in the table's order.
    """
    table = cast(sa.Table, model.__table__)
    keys = [column.name for column in table.primary_key.columns]
    counts = [column.name for column in table.columns if column.name not in keys]
    # One order for all writers, so that two transactions never wait for each other.
    rows = [
        dict(zip(keys, key, strict=True)) | dict(zip(counts, deltas[key], strict=True))
        for key in sorted(deltas)
        if any(deltas[key])
    ]
    if not rows:
        return
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = insert(table)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=keys, set_={name: table.c[name] + statement.excluded[name] for name in counts}
        ),
        rows,
    )
