"""Projects and labelers of a tenant, versions of settings, adjudication, order and holding of items, lifted blocks."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)
QUEUE = "ix_items_project_id_honeypot_open_slots"


def upgrade() -> None:
    with op.batch_alter_table("projects") as batch:
        batch.add_column(sa.Column("customer", sa.String(200), nullable=False, server_default=""))
        batch.add_column(sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
    op.create_table(
        "project_versions",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("settings", JSON, nullable=False),
        sa.Column("by", sa.String(200), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_project_versions_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "version", name=op.f("pk_project_versions")),
    )
    with op.batch_alter_table("labelers") as batch:
        batch.add_column(sa.Column("customer", sa.String(200), nullable=False, server_default=""))
        batch.drop_constraint("uq_labelers_name", type_="unique")
        batch.create_unique_constraint(op.f("uq_labelers_customer_name"), ["customer", "name"])
    with op.batch_alter_table("items") as batch:
        batch.add_column(sa.Column("place", sa.Float(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("resolution", JSON, nullable=True))
        batch.add_column(sa.Column("resolved_by", sa.String(200), nullable=True))
        batch.add_column(sa.Column("resolved_at", TIME, nullable=True))
    op.drop_index(op.f(f"{QUEUE}_id"), table_name="items")
    op.create_index(op.f(f"{QUEUE}_place_id"), "items", ["project_id", "honeypot", "open_slots", "place", "id"])
    with op.batch_alter_table("assignments") as batch:
        batch.add_column(sa.Column("held", sa.Boolean(), nullable=False, server_default=sa.false()))
    with op.batch_alter_table("judgements") as batch:
        batch.add_column(sa.Column("project_version", sa.Integer(), nullable=False, server_default="1"))
        batch.add_column(sa.Column("undone_why", sa.String(16), nullable=True))
    with op.batch_alter_table("deletions") as batch:
        batch.add_column(sa.Column("lifted_at", TIME, nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("deletions") as batch:
        batch.drop_column("lifted_at")
    with op.batch_alter_table("judgements") as batch:
        batch.drop_column("undone_why")
        batch.drop_column("project_version")
    with op.batch_alter_table("assignments") as batch:
        batch.drop_column("held")
    op.drop_index(op.f(f"{QUEUE}_place_id"), table_name="items")
    op.create_index(op.f(f"{QUEUE}_id"), "items", ["project_id", "honeypot", "open_slots", "id"])
    with op.batch_alter_table("items") as batch:
        for name in ("resolved_at", "resolved_by", "resolution", "place"):
            batch.drop_column(name)
    with op.batch_alter_table("labelers") as batch:
        batch.drop_constraint("uq_labelers_customer_name", type_="unique")
        batch.create_unique_constraint(op.f("uq_labelers_name"), ["name"])
        batch.drop_column("customer")
    op.drop_table("project_versions")
    with op.batch_alter_table("projects") as batch:
        batch.drop_column("version")
        batch.drop_column("customer")
