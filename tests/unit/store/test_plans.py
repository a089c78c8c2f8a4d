"""The operator's page looks at the last day, by indexes, however much there was before."""

from __future__ import annotations

import datetime as dt
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.load_year import add_answers
from services.gateway.pages.figures import SPANS, operator_figures
from steersman.store import Store


def _figures(store: Store) -> dict[str, Any]:
    with store.reading() as session:
        return operator_figures(session, SPANS["24h"], dt.datetime.now(dt.UTC))


def test_the_operators_page_walks_through_no_whole_table(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    store = Store.open(f"sqlite:///{file}")
    add_answers(store, 0, 800, 1600)
    asked: list[tuple[str, Any]] = []

    @sa.event.listens_for(store.engine, "before_cursor_execute")
    def _(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.lstrip().upper().startswith("SELECT"):
            asked.append((statement, parameters))

    assert _figures(store)["answers"] > 0
    store.close()
    assert len(asked) > 4
    with sqlite3.connect(file) as raw:
        for statement, parameters in asked:
            plan = [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            tables = ("SCAN answers", "SCAN feedback_events", "SCAN gateway_audit")
            assert not [step for step in plan if step.startswith(tables)], (statement, plan)


def test_the_operators_page_says_the_same_of_either_database(store: Store) -> None:
    add_answers(store, 0, 30, 365 * 40)  # of the last 18 hours
    add_answers(store, 80, 90, 365 * 40)  # of two days ago
    figures = _figures(store)
    assert (figures["answers"], figures["prompt_tokens"]) == (30, 20 * 30)
    (version,) = figures["versions"]
    feedback = {"thumbs down": 1, "thumbs up": 2}
    assert version == {"deployment": "champion", "version": "0", "answers": 30, "feedback": feedback}
