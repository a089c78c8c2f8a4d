"""Votes are counted by item, so that intervals draw items and not the pairs of a ranking's answers."""

from collections import Counter, defaultdict
from itertools import combinations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
PATTERNS = sa.table("unit_patterns", *map(sa.column, ("project_id", "question", "pattern", "n")))
CURRENT = sa.text("""
    SELECT j.project_id AS project_id, j.item_id AS item_id, j.verdict AS verdict
    FROM judgements j JOIN items i ON i.id = j.item_id JOIN projects p ON p.id = j.project_id
    WHERE p.kind = 'rank' AND j.undone_at IS NULL AND NOT i.honeypot ORDER BY j.item_id
""").columns(project_id=sa.Integer, item_id=sa.BigInteger, verdict=JSON)


def upgrade() -> None:
    with op.batch_alter_table("unit_patterns") as batch:
        batch.alter_column("pattern", type_=sa.String(1000), existing_type=sa.String(200), existing_nullable=False)
    _count_rankings("|".join)


def downgrade() -> None:
    _count_rankings(None)
    with op.batch_alter_table("unit_patterns") as batch:
        batch.alter_column("pattern", type_=sa.String(200), existing_type=sa.String(1000), existing_nullable=False)


def _count_rankings(join) -> None:  # type: ignore[no-untyped-def]
    """Counts the votes of ranking projects anew, by item or (None) by pair; of the other kinds both are the same."""
    connection = op.get_bind()
    items: dict[tuple[int, int], dict[int, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    for row in connection.execute(CURRENT):
        place = {answer: at for at, group in enumerate(row.verdict.get("ranking") or ()) for answer in group}
        if row.verdict.get("skip"):
            continue
        for unit, (one, two) in enumerate(combinations(sorted(place), 2)):
            value = (place[one] > place[two]) - (place[one] < place[two]) + 1
            items[row.project_id, row.item_id][unit][value] += 1
    counts: Counter[tuple[int, str]] = Counter()
    for (project, _), units in items.items():
        texts = sorted(",".join(f"{value}:{n}" for value, n in sorted(votes.items())) for votes in units.values())
        for text in [join(texts)] if join else texts:
            counts[project, text] += 1
    ranking = sa.text("DELETE FROM unit_patterns WHERE project_id IN (SELECT id FROM projects WHERE kind = 'rank')")
    connection.execute(ranking)
    if counts:
        rows = [{"project_id": p, "question": "preference", "pattern": text, "n": n} for (p, text), n in counts.items()]
        connection.execute(sa.insert(PATTERNS), rows)
