"""Projects, judgements, live feedback and releases."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "answers",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("conversation_id", sa.String(length=64), nullable=True),
        sa.Column("customer", sa.String(length=200), nullable=False),
        sa.Column("deployment", sa.String(length=200), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("weights_version", sa.String(length=64), nullable=False),
        sa.Column("prompt", JSON, nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("consent", sa.Boolean(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_answers")),
    )
    op.create_index(op.f("ix_answers_conversation_id"), "answers", ["conversation_id"], unique=False)
    op.create_index(op.f("ix_answers_customer"), "answers", ["customer"], unique=False)
    op.create_index(op.f("ix_answers_deployment_created_at"), "answers", ["deployment", "created_at"], unique=False)
    op.create_table(
        "deletions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("customer", sa.String(length=200), nullable=False),
        sa.Column("report", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deletions")),
    )
    op.create_table(
        "feedback_hours",
        sa.Column("deployment", sa.String(length=200), nullable=False),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("value", sa.String(length=200), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("deployment", "hour", "kind", "value", name=op.f("pk_feedback_hours")),
    )
    op.create_table(
        "labelers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_labelers")),
        sa.UniqueConstraint("name", name=op.f("uq_labelers_name")),
    )
    op.create_table(
        "projects",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("guidelines", sa.Text(), nullable=False),
        sa.Column("aspects", JSON, nullable=False),
        sa.Column("overlap", sa.Integer(), nullable=False),
        sa.Column("honeypot_every", sa.Integer(), nullable=False),
        sa.Column("thresholds", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("name", name=op.f("uq_projects_name")),
    )
    op.create_table(
        "releases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("card", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("withdrawn_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("withdrawn_reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_releases")),
        sa.UniqueConstraint("name", "version", name=op.f("uq_releases_name_version")),
    )
    op.create_table(
        "agreement_days",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("question", sa.String(length=64), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("pairs", sa.BigInteger(), nullable=False),
        sa.Column("agreeing", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_agreement_days_project_id")),
        sa.PrimaryKeyConstraint("project_id", "question", "day", name=op.f("pk_agreement_days")),
    )
    op.create_table(
        "feedback_events",
        sa.Column("id", BIG_KEY, nullable=False),
        sa.Column("customer", sa.String(length=200), nullable=False),
        sa.Column("event_id", sa.String(length=128), nullable=False),
        sa.Column("answer_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["answer_id"], ["answers.id"], name=op.f("fk_feedback_events_answer_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feedback_events")),
        sa.UniqueConstraint("customer", "event_id", name=op.f("uq_feedback_events_customer_event_id")),
    )
    op.create_index(op.f("ix_feedback_events_answer_id"), "feedback_events", ["answer_id"], unique=False)
    op.create_table(
        "items",
        sa.Column("id", BIG_KEY, nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("prompt", JSON, nullable=False),
        sa.Column("candidates", JSON, nullable=False),
        sa.Column("meta", JSON, nullable=False),
        sa.Column("customer", sa.String(length=200), nullable=True),
        sa.Column("consent", sa.Boolean(), nullable=True),
        sa.Column("honeypot", sa.Boolean(), nullable=False),
        sa.Column("expected", JSON, nullable=True),
        sa.Column("open_slots", sa.Integer(), nullable=False),
        sa.Column("judgements", sa.Integer(), nullable=False),
        sa.Column("disagreement", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_items_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_items")),
        sa.UniqueConstraint("project_id", "key", name=op.f("uq_items_project_id_key")),
    )
    op.create_index(op.f("ix_items_customer"), "items", ["customer"], unique=False)
    op.create_index(op.f("ix_items_project_id_disagreement"), "items", ["project_id", "disagreement"], unique=False)
    op.create_index(
        op.f("ix_items_project_id_honeypot_open_slots_id"),
        "items",
        ["project_id", "honeypot", "open_slots", "id"],
        unique=False,
    )
    op.create_table(
        "labeler_days",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("labeler_id", sa.Integer(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("judgements", sa.BigInteger(), nullable=False),
        sa.Column("skipped", sa.BigInteger(), nullable=False),
        sa.Column("unsafe", sa.BigInteger(), nullable=False),
        sa.Column("milliseconds", sa.BigInteger(), nullable=False),
        sa.Column("decided", sa.BigInteger(), nullable=False),
        sa.Column("decided_first", sa.BigInteger(), nullable=False),
        sa.Column("honeypots", sa.BigInteger(), nullable=False),
        sa.Column("honeypots_right", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["labeler_id"], ["labelers.id"], name=op.f("fk_labeler_days_labeler_id")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_labeler_days_project_id")),
        sa.PrimaryKeyConstraint("project_id", "labeler_id", "day", name=op.f("pk_labeler_days")),
    )
    op.create_table(
        "release_customers",
        sa.Column("release_id", sa.Integer(), nullable=False),
        sa.Column("customer", sa.String(length=200), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name=op.f("fk_release_customers_release_id")),
        sa.PrimaryKeyConstraint("release_id", "customer", name=op.f("pk_release_customers")),
    )
    op.create_index(op.f("ix_release_customers_customer"), "release_customers", ["customer"], unique=False)
    op.create_table(
        "trainings",
        sa.Column("release_id", sa.Integer(), nullable=False),
        sa.Column("run", sa.String(length=200), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name=op.f("fk_trainings_release_id")),
        sa.PrimaryKeyConstraint("release_id", "run", "model", name=op.f("pk_trainings")),
    )
    op.create_table(
        "unit_patterns",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("question", sa.String(length=64), nullable=False),
        sa.Column("pattern", sa.String(length=200), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_unit_patterns_project_id")),
        sa.PrimaryKeyConstraint("project_id", "question", "pattern", name=op.f("pk_unit_patterns")),
    )
    op.create_table(
        "vote_pairs",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("question", sa.String(length=64), nullable=False),
        sa.Column("labeler_a", sa.Integer(), nullable=False),
        sa.Column("labeler_b", sa.Integer(), nullable=False),
        sa.Column("value_a", sa.Integer(), nullable=False),
        sa.Column("value_b", sa.Integer(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["labeler_a"], ["labelers.id"], name=op.f("fk_vote_pairs_labeler_a")),
        sa.ForeignKeyConstraint(["labeler_b"], ["labelers.id"], name=op.f("fk_vote_pairs_labeler_b")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_vote_pairs_project_id")),
        sa.PrimaryKeyConstraint(
            "project_id", "question", "labeler_a", "labeler_b", "value_a", "value_b", name=op.f("pk_vote_pairs")
        ),
    )
    op.create_table(
        "assignments",
        sa.Column("item_id", BIG_KEY, nullable=False),
        sa.Column("labeler_id", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("shown", JSON, nullable=False),
        sa.Column("state", sa.String(length=8), nullable=False),
        sa.Column("assigned_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name=op.f("fk_assignments_item_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["labeler_id"], ["labelers.id"], name=op.f("fk_assignments_labeler_id")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_assignments_project_id")),
        sa.PrimaryKeyConstraint("item_id", "labeler_id", name=op.f("pk_assignments")),
    )
    op.create_index(
        op.f("ix_assignments_labeler_id_project_id_state"),
        "assignments",
        ["labeler_id", "project_id", "state"],
        unique=False,
    )
    op.create_index(op.f("ix_assignments_state_assigned_at"), "assignments", ["state", "assigned_at"], unique=False)
    op.create_table(
        "judgements",
        sa.Column("id", BIG_KEY, nullable=False),
        sa.Column("event_id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("item_id", BIG_KEY, nullable=False),
        sa.Column("labeler_id", sa.Integer(), nullable=False),
        sa.Column("verdict", JSON, nullable=False),
        sa.Column("shown", JSON, nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("undone_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name=op.f("fk_judgements_item_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["labeler_id"], ["labelers.id"], name=op.f("fk_judgements_labeler_id")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_judgements_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_judgements")),
        sa.UniqueConstraint("event_id", name=op.f("uq_judgements_event_id")),
    )
    op.create_index(
        op.f("ix_judgements_labeler_id_project_id_id"), "judgements", ["labeler_id", "project_id", "id"], unique=False
    )
    op.create_index(
        "uq_judgements_current",
        "judgements",
        ["item_id", "labeler_id"],
        unique=True,
        sqlite_where=sa.text("undone_at IS NULL"),
        postgresql_where=sa.text("undone_at IS NULL"),
    )


def downgrade() -> None:
    op.drop_index(
        "uq_judgements_current",
        table_name="judgements",
        sqlite_where=sa.text("undone_at IS NULL"),
        postgresql_where=sa.text("undone_at IS NULL"),
    )
    op.drop_index(op.f("ix_judgements_labeler_id_project_id_id"), table_name="judgements")
    op.drop_table("judgements")
    op.drop_index(op.f("ix_assignments_state_assigned_at"), table_name="assignments")
    op.drop_index(op.f("ix_assignments_labeler_id_project_id_state"), table_name="assignments")
    op.drop_table("assignments")
    op.drop_table("vote_pairs")
    op.drop_table("unit_patterns")
    op.drop_table("trainings")
    op.drop_index(op.f("ix_release_customers_customer"), table_name="release_customers")
    op.drop_table("release_customers")
    op.drop_table("labeler_days")
    op.drop_index(op.f("ix_items_project_id_honeypot_open_slots_id"), table_name="items")
    op.drop_index(op.f("ix_items_project_id_disagreement"), table_name="items")
    op.drop_index(op.f("ix_items_customer"), table_name="items")
    op.drop_table("items")
    op.drop_index(op.f("ix_feedback_events_answer_id"), table_name="feedback_events")
    op.drop_table("feedback_events")
    op.drop_table("agreement_days")
    op.drop_table("releases")
    op.drop_table("projects")
    op.drop_table("labelers")
    op.drop_table("feedback_hours")
    op.drop_table("deletions")
    op.drop_index(op.f("ix_answers_deployment_created_at"), table_name="answers")
    op.drop_index(op.f("ix_answers_customer"), table_name="answers")
    op.drop_index(op.f("ix_answers_conversation_id"), table_name="answers")
    op.drop_table("answers")
