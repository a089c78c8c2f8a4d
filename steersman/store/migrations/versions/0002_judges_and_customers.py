"""Judges, end customers, what an answer rests on; the gateway's tables.

Until now the gateway made its tables without a migration: where they are there already, what they lack is added.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
NONE_AS_NULL = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    with op.batch_alter_table("answers") as batch:
        batch.add_column(sa.Column("end_customer", sa.String(64), nullable=False, server_default=""))
        batch.add_column(sa.Column("adapter", sa.String(200), nullable=False, server_default=""))
        batch.add_column(sa.Column("lookups", JSON, nullable=False, server_default="[]"))
        batch.add_column(sa.Column("tool_calls", JSON, nullable=False, server_default="[]"))
        batch.add_column(sa.Column("sampling", JSON, nullable=False, server_default="{}"))
        batch.add_column(sa.Column("token_ids", sa.LargeBinary(), nullable=True))
        batch.add_column(sa.Column("logprobs", sa.LargeBinary(), nullable=True))
    op.drop_index(op.f("ix_answers_customer"), table_name="answers")
    op.create_index(op.f("ix_answers_customer_end_customer"), "answers", ["customer", "end_customer"])
    op.create_index(op.f("ix_answers_created_at"), "answers", ["created_at"])
    with op.batch_alter_table("feedback_events") as batch:
        batch.add_column(sa.Column("channel", sa.String(16), nullable=False, server_default="application"))
        batch.add_column(sa.Column("judge", sa.String(200), nullable=False, server_default=""))
        batch.add_column(sa.Column("origin", sa.String(64), nullable=False, server_default=""))
        batch.add_column(sa.Column("current", sa.Boolean(), nullable=False, server_default=sa.true()))
    # Until now every judge was the same one: of what was said about an answer, the last counts.
    op.execute(
        "UPDATE feedback_events SET current = false WHERE EXISTS (SELECT 1 FROM feedback_events later WHERE"
        " later.answer_id = feedback_events.answer_id AND later.kind = feedback_events.kind"
        " AND later.id > feedback_events.id AND (later.kind <> 'outcome' OR later.value = feedback_events.value))"
    )
    op.drop_table("feedback_hours")
    with op.batch_alter_table("deletions") as batch:
        batch.add_column(sa.Column("end_customer", sa.String(64), nullable=False, server_default=""))
    op.create_table(
        "release_end_customers",
        sa.Column("release_id", sa.Integer(), nullable=False),
        sa.Column("end_customer", sa.String(64), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name=op.f("fk_release_end_customers_release_id")),
        sa.PrimaryKeyConstraint("release_id", "end_customer", name=op.f("pk_release_end_customers")),
    )
    op.create_index(op.f("ix_release_end_customers_end_customer"), "release_end_customers", ["end_customer"])
    there = set(sa.inspect(op.get_bind()).get_table_names())
    for name, columns in _tables().items():
        if name not in there:
            op.create_table(name, *columns)
        else:
            held = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(name)}
            for column in columns:
                if isinstance(column, sa.Column) and column.name not in held:
                    op.add_column(name, column)
    for table, index, columns in _INDEXES:
        op.create_index(index, table, columns, if_not_exists=True)


def downgrade() -> None:
    for name in _tables():
        op.drop_table(name)
    op.drop_table("release_end_customers")
    with op.batch_alter_table("deletions") as batch:
        batch.drop_column("end_customer")
    op.create_table(
        "feedback_hours",
        sa.Column("deployment", sa.String(length=200), nullable=False),
        sa.Column("hour", TIME, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("value", sa.String(length=200), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("deployment", "hour", "kind", "value", name=op.f("pk_feedback_hours")),
    )
    with op.batch_alter_table("feedback_events") as batch:
        for column in ("channel", "judge", "origin", "current"):
            batch.drop_column(column)
    op.drop_index(op.f("ix_answers_customer_end_customer"), table_name="answers")
    op.drop_index(op.f("ix_answers_created_at"), table_name="answers")
    with op.batch_alter_table("answers") as batch:
        for column in ("end_customer", "adapter", "lookups", "tool_calls", "sampling", "token_ids", "logprobs"):
            batch.drop_column(column)
    op.create_index(op.f("ix_answers_customer"), "answers", ["customer"])


def _tables() -> dict[str, list[Any]]:
    return {
        "gateway_secrets": [
            sa.Column("name", sa.String(64), nullable=False),
            sa.Column("value", sa.String(64), nullable=False),
            sa.PrimaryKeyConstraint("name", name="pk_gateway_secrets"),
        ],
        "gateway_api_keys": [
            sa.Column("id", sa.String(16), nullable=False),
            sa.Column("digest", sa.String(64), nullable=False),
            sa.Column("tenant", sa.String(200), nullable=False),
            sa.Column("scopes", JSON, nullable=False),
            sa.Column("note", sa.Text(), nullable=False),
            sa.Column("requests_per_minute", sa.Integer(), nullable=True),
            sa.Column("tokens_per_minute", sa.Integer(), nullable=True),
            sa.Column("tokens_per_day", sa.BigInteger(), nullable=True),
            sa.Column("concurrent", sa.Integer(), nullable=True),
            sa.Column("created_at", TIME, nullable=False),
            sa.Column("expires_at", TIME, nullable=True),
            sa.Column("revoked_at", TIME, nullable=True),
            sa.PrimaryKeyConstraint("id", name="pk_gateway_api_keys"),
        ],
        "gateway_key_use": [
            sa.Column("key_id", sa.String(64), nullable=False),
            sa.Column("day", sa.Date(), nullable=False),
            sa.Column("requests", sa.BigInteger(), nullable=False),
            sa.Column("tokens", sa.BigInteger(), nullable=False),
            sa.PrimaryKeyConstraint("key_id", "day", name="pk_gateway_key_use"),
        ],
        "gateway_key_windows": [
            sa.Column("key_id", sa.String(64), nullable=False),
            sa.Column("began_at", TIME, nullable=False),
            sa.Column("requests", sa.BigInteger(), nullable=False),
            sa.Column("tokens", sa.BigInteger(), nullable=False),
            sa.PrimaryKeyConstraint("key_id", name="pk_gateway_key_windows"),
        ],
        "gateway_reservations": [
            sa.Column("id", sa.String(32), nullable=False),
            sa.Column("key_id", sa.String(64), nullable=False),
            sa.Column("tokens", sa.BigInteger(), nullable=False),
            sa.Column("expires_at", TIME, nullable=False),
            sa.PrimaryKeyConstraint("id", name="pk_gateway_reservations"),
        ],
        "gateway_audit": [
            sa.Column("id", BIG_KEY, nullable=False),
            sa.Column("at", TIME, nullable=False),
            sa.Column("request_id", sa.String(128), nullable=False),
            sa.Column("action", sa.String(32), nullable=False),
            sa.Column("outcome", sa.String(32), nullable=False),
            sa.Column("tenant", sa.String(200), nullable=False),
            sa.Column("key_id", sa.String(64), nullable=False),
            sa.Column("customer", sa.String(200), nullable=False),
            sa.Column("origin", sa.String(64), nullable=False, server_default=""),
            sa.Column("answer_id", sa.String(64), nullable=False),
            sa.Column("records", JSON, nullable=False),
            sa.Column("weights_version", sa.String(64), nullable=False),
            sa.Column("prompt_tokens", sa.Integer(), nullable=False),
            sa.Column("completion_tokens", sa.Integer(), nullable=False),
            sa.Column("milliseconds", sa.Integer(), nullable=False),
            sa.Column("first_token_milliseconds", sa.Integer(), nullable=False),
            sa.PrimaryKeyConstraint("id", name="pk_gateway_audit"),
        ],
        "gateway_conversations": [
            sa.Column("tenant", sa.String(200), nullable=False),
            sa.Column("customer", sa.String(200), nullable=False),
            sa.Column("id", sa.String(64), nullable=False),
            sa.Column("turns", JSON, nullable=False),
            sa.Column("expires_at", TIME, nullable=False),
            sa.PrimaryKeyConstraint("tenant", "customer", "id", name="pk_gateway_conversations"),
        ],
        "gateway_idempotency": [
            sa.Column("scope", sa.String(400), nullable=False),
            sa.Column("key", sa.String(255), nullable=False),
            sa.Column("request_digest", sa.String(64), nullable=False),
            sa.Column("result", NONE_AS_NULL, nullable=True),
            sa.Column("owner", sa.String(32), nullable=False, server_default=""),
            sa.Column("tenant", sa.String(200), nullable=False, server_default=""),
            sa.Column("customer", sa.String(200), nullable=False, server_default=""),
            sa.Column("expires_at", TIME, nullable=False),
            sa.PrimaryKeyConstraint("scope", "key", name="pk_gateway_idempotency"),
        ],
        "gateway_proposed_actions": [
            sa.Column("id", sa.String(64), nullable=False),
            sa.Column("tenant", sa.String(200), nullable=False),
            sa.Column("customer", sa.String(200), nullable=False),
            sa.Column("action", sa.String(32), nullable=False),
            sa.Column("arguments", JSON, nullable=False),
            sa.Column("transcript", JSON, nullable=False),
            sa.Column("state", sa.String(16), nullable=False),
            sa.Column("ticket", sa.String(200), nullable=False),
            sa.Column("expires_at", TIME, nullable=False),
            sa.PrimaryKeyConstraint("id", name="pk_gateway_proposed_actions"),
        ],
    }


_INDEXES = [
    ("gateway_audit", "ix_gateway_audit_at", ["at"]),
    ("gateway_audit", "ix_gateway_audit_answer", ["answer_id"]),
    ("gateway_conversations", "ix_gateway_conversations_expires_at", ["expires_at"]),
    ("gateway_idempotency", "ix_gateway_idempotency_expires_at", ["expires_at"]),
    ("gateway_reservations", "ix_gateway_reservations_key", ["key_id"]),
]
