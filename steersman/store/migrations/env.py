"""Alembic environment: runs on the connection that `Store.migrate` hands over."""

from alembic import context

import steersman.store.serving  # noqa: F401  its tables, too
from steersman.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
