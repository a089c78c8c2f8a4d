"""What is erased is found by an index: judgements of an item, lines of an end customer."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_index(op.f("ix_judgements_item_id"), "judgements", ["item_id"])
    op.create_index("ix_gateway_audit_customer", "gateway_audit", ["tenant", "customer"])


def downgrade() -> None:
    op.drop_index("ix_gateway_audit_customer", table_name="gateway_audit")
    op.drop_index(op.f("ix_judgements_item_id"), table_name="judgements")
