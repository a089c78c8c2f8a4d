"""Live feedback through the gateway's own process: what was acknowledged outlives kill -9, and counts once."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from loaded import Command, Loaded

from services.gateway.testing import free_port, wait_for_port
from steersman.store import Store
from steersman.store.feedback import feedback_counts, feedback_rows
from steersman.store.models import FeedbackEvent
from steersman.testing.fake_policy import FakePolicy, serve_policy

BODY = {"model": "steersman", "messages": [{"role": "user", "content": "where is my order?"}]}
LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


async def start(loaded: Loaded, root: Path, endpoint: str, database: str) -> tuple[Command, httpx.AsyncClient]:
    port = free_port()
    settings = [f"port={port}", "grpcPort=0", f"database={database}", f"policy.endpoints=[{endpoint}]"]
    settings += ["limits.feedbackPerMinute=10000"]
    process = loaded.start(*(f"--set={setting}" for setting in settings), module="services.gateway", cwd=root)
    await asyncio.to_thread(wait_for_port, port, process)
    return process, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)


async def test_acknowledged_feedback_outlives_kill_9_and_counts_once(
    repo_root: Path, tmp_path: Path, loaded: Loaded
) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    acknowledged: list[dict[str, Any]] = []
    async with serve_policy(FakePolicy()) as endpoint:
        process, http = await start(loaded, repo_root, endpoint, database)
        try:
            answer_id = (await http.post("/v1/chat/completions", json=BODY)).json()["id"]

            async def send(event: dict[str, Any]) -> None:
                response = await http.post("/v1/feedback", json={"answer_id": answer_id, **event})
                assert response.json() == {"created": True}
                acknowledged.append(event)
                if len(acknowledged) == 40:
                    process.kill()  # SIGKILL, with other events under way

            said = [{"thumbs": "down", "reason": "wrong"}, {"edited_answer": "On Monday."}]
            said += [{"outcome": name} for name in ("ticket_reopened", "order_cancelled", "refund")]
            events = [{"event_id": f"e{n}", **said[n % len(said)]} for n in range(120)]
            await asyncio.gather(*(send(event) for event in events), return_exceptions=True)
            assert 40 <= len(acknowledged) < len(events)
            await asyncio.to_thread(process.wait, 30)
            await http.aclose()

            process, http = await start(loaded, repo_root, endpoint, database)
            for event in acknowledged:
                again = await http.post("/v1/feedback", json={"answer_id": answer_id, **event})
                assert again.json() == {"created": False}, "it was stored before the kill"
            for event in events:
                assert (await http.post("/v1/feedback", json={"answer_id": answer_id, **event})).status_code == 200
        finally:
            process.kill()
            await http.aclose()
    with Store.open(database).reading() as session:
        counts = feedback_counts(session, "", LONG_AGO)
        (row,) = feedback_rows(session)
    # Every event is stored; of one judge on one answer the latest of its kind counts.
    with Store.open(database).reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(FeedbackEvent)) == len(events)
    assert counts == {
        ("thumbs", "down"): 1, ("edit", "edit"): 1, ("outcome", "ticket_reopened"): 1,
        ("outcome", "order_cancelled"): 1, ("outcome", "refund"): 1,
    }  # fmt: skip
    assert row["label"] is False
