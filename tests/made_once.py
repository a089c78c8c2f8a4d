"""What tests would make hundreds of times, each time for a while: made once, and copied or shared.

A pytest plugin. New SQLite databases are copies of the first that was migrated; migrations as such are tested where
there is something to migrate, and on PostgreSQL. HTTP clients share the certificates that they trust.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import ssl
import threading
from typing import Any, cast

from httpx._transports import default as http

from steersman.store.engine import Store

_migrate = Store.migrate
_migrated = sqlite3.connect(":memory:")
"""Empty before the first."""


def _revision(connection: sqlite3.Connection) -> str | None:
    """None: an empty database."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()) if tables else None


def _migrate_or_copy(store: Store, revision: str = "head") -> None:
    others = threading.current_thread() is not threading.main_thread()  # who may migrate at the same time, as tests ask
    if store.engine.dialect.name != "sqlite" or revision != "head" or others:
        return _migrate(store, revision)
    with contextlib.ExitStack() as stack:
        try:
            pooled = stack.enter_context(contextlib.closing(store.engine.raw_connection()))
            connection = cast(Any, pooled.driver_connection)
            before, head = _revision(connection), _revision(_migrated)
        except sqlite3.Error:  # which opening it will explain
            return _migrate(store)
        if head is None or before not in (None, head):
            _migrate(store)
        elif before is None:
            _migrated.backup(connection)
        if head is None and before is None:
            connection.backup(_migrated)
    return None


_ssl_context = http.create_ssl_context


@functools.cache
def _usual_context(file: str | None, folder: str | None) -> ssl.SSLContext:
    return _ssl_context()


def _shared_context(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
    if verify is True and cert is None and trust_env:
        return _usual_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    return _ssl_context(verify, cert, trust_env)


Store.migrate = _migrate_or_copy  # type: ignore[method-assign]
http.create_ssl_context = _shared_context
