"""What to do when the database fails: the one place that decides.

retry    this transaction lost a race; the same again, at once
wait     the database is away, read-only, full or being set up; the same again, later
refuse   the database works and will never take this
"""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sa

Decision = Literal["retry", "wait", "refuse"]

# PostgreSQL, appendix A of its manual: classes by their first two characters, then what differs from its class.
_CLASSES: dict[str, Decision] = {
    "08": "wait",  # connection exception
    "28": "wait",  # invalid authorization: a password that is being changed
    "3D": "wait",  # no such database: being restored
    "3F": "wait",  # no such schema
    "40": "retry",  # transaction rollback: serialization, deadlock
    "53": "wait",  # insufficient resources: disk full, too many connections
    "57": "wait",  # operator intervention: shutdown, not yet up
    "58": "wait",  # system error: input and output
    "F0": "wait",  # configuration file error
    "XX": "wait",  # internal error, corrupted data
}
_CODES: dict[str, Decision] = {
    "25006": "wait",  # read-only transaction: a standby, or a primary after a failover
    "25P03": "retry",  # idle in transaction too long
    "42501": "wait",  # insufficient privilege: rights that are being set up
    "42P01": "wait",  # no such table, no such column: a migration that has not run yet
    "42703": "wait",
    "55P03": "retry",  # lock not available
    "55006": "wait",  # object in use
    "57014": "retry",  # statement cancelled by its time limit
}
# SQLite, primary result codes: https://sqlite.org/rescode.html
_SQLITE: dict[str, Decision] = {
    "SQLITE_BUSY": "retry",
    "SQLITE_LOCKED": "retry",
    "SQLITE_READONLY": "wait",
    "SQLITE_IOERR": "wait",
    "SQLITE_FULL": "wait",
    "SQLITE_CANTOPEN": "wait",
    "SQLITE_CORRUPT": "wait",
    "SQLITE_NOTADB": "wait",
    "SQLITE_PROTOCOL": "retry",
    "SQLITE_SCHEMA": "retry",
    "SQLITE_NOMEM": "wait",
    "SQLITE_PERM": "wait",
    "SQLITE_AUTH": "wait",
    "SQLITE_INTERRUPT": "retry",
}
_SCHEMA_WORDS = ("no such table", "no such column", "has no column")


def decide(error: BaseException) -> Decision:
    """What follows from an error of the store."""
    if isinstance(error, sa.exc.TimeoutError | sa.exc.DisconnectionError):  # the pool's: nothing free, nothing alive
        return "wait"
    if isinstance(error, OSError):
        return "wait"
    if not isinstance(error, sa.exc.DBAPIError):
        return "refuse"
    if error.connection_invalidated:
        return "wait"
    code = getattr(error.orig, "sqlstate", None)
    if code:
        return _CODES.get(code) or _CLASSES.get(code[:2], "refuse")
    name = getattr(error.orig, "sqlite_errorname", None)
    if name:
        known = next((decision for prefix, decision in _SQLITE.items() if name.startswith(prefix)), None)
        if known is None and name.startswith("SQLITE_ERROR") and any(word in str(error.orig) for word in _SCHEMA_WORDS):
            return "wait"
        return known or "refuse"
    # Without a code the connection itself failed.
    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.InternalError):
        return "wait"
    return "refuse"
