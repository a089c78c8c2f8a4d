"""Pages are found by indexes, however much there was before."""

from __future__ import annotations

import datetime as dt
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from benchmarks.load_year import add_answers
from services.gateway.pages.figures import SPANS, operator_figures
from steersman.store import Store
from steersman.store.judging import NewItem, add_items, create_project
from steersman.store.managing import STATES, find_items


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


@pytest.mark.parametrize("after", [None, (0.5, 20)])
@pytest.mark.parametrize("tenant", [None, "tenant 3"])
def test_a_page_of_items_sorts_nothing(store: Store, after: tuple[float, int] | None, tenant: str | None) -> None:
    with store.transaction() as session:
        project = create_project(session, "p", "compare")
        others = create_project(session, "q", "compare")
        answers = [{"messages": [{"role": "assistant", "content": str(n)}]} for n in range(2)]
        for each in (project, others):
            add_items(session, each, [NewItem(str(n), [{"role": "user", "content": "?"}], answers) for n in range(300)])
    asked: list[tuple[str, Any]] = []
    with store.reading() as session:
        connection = session.connection()

        @sa.event.listens_for(connection, "before_cursor_execute")
        def _(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            asked.append((statement, parameters))

        for state in STATES:
            find_items(session, project, state=state, tenant=tenant, after=after)
        queries = list(asked)
        assert len(queries) == len(STATES) * (1 if after is None else 2)
        postgresql = store.engine.dialect.name == "postgresql"
        if postgresql:
            connection.exec_driver_sql("ANALYZE items")
            connection.exec_driver_sql("SET LOCAL enable_sort = off")
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, parameters in queries:
            explain = "EXPLAIN" if postgresql else "EXPLAIN QUERY PLAN"
            plan = [str(row[-1]) for row in connection.exec_driver_sql(f"{explain} {statement}", parameters)]
            assert not [step for step in plan if "Sort" in step or "ORDER BY" in step], (statement, plan)
            assert any("ix_items_" in step for step in plan), (statement, plan)


def test_the_operators_page_says_the_same_of_either_database(store: Store) -> None:
    add_answers(store, 0, 30, 365 * 40)  # of the last 18 hours
    add_answers(store, 80, 90, 365 * 40)  # of two days ago
    figures = _figures(store)
    assert (figures["answers"], figures["prompt_tokens"]) == (30, 20 * 30)
    (version,) = figures["versions"]
    feedback = {"thumbs down": 1, "thumbs up": 2}
    assert version == {"deployment": "champion", "version": "0", "answers": 30, "feedback": feedback}
