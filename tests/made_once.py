"""What tests would make hundreds of times, each time for a while: made once, and copied or shared.

A pytest plugin. New SQLite databases are copies of the first that was migrated; migrations as such are tested where
there is something to migrate, by several at once, and on PostgreSQL. HTTP clients share the certificates they trust.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import ssl
import sys
import threading
from typing import Any


def pytest_collection_finish() -> None:
    """What no test has imported stays as it is, and need not be there."""
    if engine := sys.modules.get("steersman.store.engine"):
        _copy_databases(engine.Store)
    if transports := sys.modules.get("httpx._transports.default"):
        _share_certificates(transports)
    if "torch" in sys.modules:
        _describe_the_machine_once()


def _copy_databases(store_class: Any) -> None:
    migrate = store_class.migrate
    migrated = sqlite3.connect(":memory:")  # empty before the first

    def migrate_or_copy(store: Any, revision: str = "head") -> None:
        others = threading.current_thread() is not threading.main_thread()  # who may do so at the same time
        if store.engine.dialect.name != "sqlite" or revision != "head" or others:
            return migrate(store, revision)
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(contextlib.closing(store.engine.raw_connection())).driver_connection
                before, head = _revision(connection), _revision(migrated)
            except sqlite3.Error:  # which opening it will explain
                return migrate(store)
            if head is None or before not in (None, head):
                migrate(store)
            elif before is None:
                migrated.backup(connection)
            if head is None and before is None:
                connection.backup(migrated)
        return None

    store_class.migrate = migrate_or_copy


def _revision(connection: sqlite3.Connection) -> str | None:
    """None: an empty database."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()) if tables else None


def _share_certificates(transports: Any) -> None:
    make = transports.create_ssl_context

    @functools.cache
    def usual(file: str | None, folder: str | None) -> ssl.SSLContext:
        return make()

    def shared(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
        if verify is True and cert is None and trust_env:
            return usual(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        return make(verify, cert, trust_env)

    transports.create_ssl_context = shared


def _describe_the_machine_once() -> None:
    """lm-evaluation-harness puts into each result what `pip list` says, which it asks twice for a second."""
    from torch.utils import collect_env

    collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)
