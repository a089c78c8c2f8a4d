"""A page of a project's items, of whichever state, is found by an index."""

import sqlalchemy as sa

from steersman.store.indexes import create_index, drop_index

revision = "0009"
down_revision = "0008"

STATES = {
    "all": None,
    "open": "open_slots > 0 AND resolved_at IS NULL AND NOT honeypot",
    "judged": "judgements > 0 AND NOT honeypot",
    "disputed": "disagreement <> 0 AND resolved_at IS NULL AND NOT honeypot",
    "resolved": "resolved_at IS NOT NULL AND NOT honeypot",
    "honeypots": "honeypot",
}


def upgrade() -> None:
    for state, which in STATES.items():
        columns: list[str | sa.TextClause] = ["project_id", sa.text("coalesce(disagreement, 0) DESC"), "id"]
        create_index(f"ix_items_{state}", "items", columns, which)


def downgrade() -> None:
    for state in STATES:
        drop_index(f"ix_items_{state}", "items")
