"""Alembic environment: runs on the connection that `Store.migrate` hands over."""

from alembic import context

from steersman.store.models import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
context.run_migrations()
