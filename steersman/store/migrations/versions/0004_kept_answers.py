"""Answers that are kept by their own id, to be read again and continued."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    with op.batch_alter_table("gateway_conversations") as batch:
        batch.add_column(sa.Column("kept", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("gateway_conversations") as batch:
        batch.drop_column("kept")
