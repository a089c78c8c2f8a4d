"""Indexes on tables that are in use."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op


def create_index(name: str, table: str, columns: Sequence[str | sa.TextClause], where: str | None = None) -> None:
    """Makes an index while others go on writing: on PostgreSQL outside of a transaction, so that what the migration did
    before is committed; it must be able to begin anew.

    Args:
        where: of a partial index.
    """
    which = sa.text(where) if where else None
    if op.get_bind().dialect.name != "postgresql":
        op.create_index(name, table, columns, sqlite_where=which)
        return
    with op.get_context().autocommit_block():
        # What is left of a build that was broken off has the name, and is never used.
        op.drop_index(name, table_name=table, if_exists=True, postgresql_concurrently=True)
        op.create_index(name, table, columns, postgresql_where=which, postgresql_concurrently=True)


def drop_index(name: str, table: str) -> None:
    """The same way back."""
    if op.get_bind().dialect.name != "postgresql":
        op.drop_index(name, table_name=table)
        return
    with op.get_context().autocommit_block():
        op.drop_index(name, table_name=table, if_exists=True, postgresql_concurrently=True)
