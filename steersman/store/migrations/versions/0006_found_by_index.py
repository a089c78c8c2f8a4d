"""What is erased, and a day's feedback, are found by an index."""

from steersman.store.indexes import create_index, drop_index

revision = "0006"
down_revision = "0005"

INDEXES = (
    ("ix_judgements_item_id", "judgements", ["item_id"]),
    ("ix_feedback_events_received_at", "feedback_events", ["received_at"]),
    ("ix_gateway_audit_customer", "gateway_audit", ["customer", "tenant"]),
)


def upgrade() -> None:
    for name, table, columns in INDEXES:
        create_index(name, table, columns)


def downgrade() -> None:
    for name, table, _ in INDEXES:
        drop_index(name, table)
