"""What is erased, and a day's feedback, are found by an index."""

from alembic import op

revision = "0006"
down_revision = "0005"

INDEXES = (
    ("ix_judgements_item_id", "judgements", ["item_id"]),
    ("ix_feedback_events_received_at", "feedback_events", ["received_at"]),
    ("ix_gateway_audit_customer", "gateway_audit", ["customer", "tenant"]),
)


def upgrade() -> None:
    for name, table, columns in INDEXES:
        op.create_index(name, table, columns)


def downgrade() -> None:
    for name, table, _ in INDEXES:
        op.drop_index(name, table_name=table)
