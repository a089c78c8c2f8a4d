"""Every page at the width of a phone and of a desk, light and dark: nothing overflows, and axe finds no fault."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from gateway_browser import browsing, every_look

from services.gateway.auth.keys import create_key
from services.gateway.store import Audit, open_store
from steersman.store import handing, judging
from steersman.store.engine import Store
from steersman.store.models import Answer, FeedbackEvent
from steersman.store.verdicts import Verdict

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

GUIDELINES = """Look at **what was done**, not only at what was said.

| said | done | verdict |
|---|---|---|
| right | looked up | good |
| right | guessed | worse |

1. True before polite.
2. Short before long.
"""
LOOKED_UP: list[dict[str, Any]] = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "orders", "arguments": '{"id": 5}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": '{"state": "sent", "carrier": "DHL", "since": "2026-11-20"}'},
    {"role": "assistant", "content": "It was sent on 20 November and is on its way with DHL."},
]
MARKDOWN = """It is **packed**:

- one
- [more](https://example.com)

| part | state |
|---|---|
| desk | sent |

```
tracking 4711
```"""


def labelled(store: Store) -> int:
    """A project with judged, disputed and open items."""
    with store.transaction() as session:
        project = judging.create_project(
            session, "shop answers", "compare", guidelines=GUIDELINES, overlap=2, thresholds={"min_alpha": 0.6}
        )
        guess = {"messages": [{"role": "assistant", "content": "It is on its way."}]}
        items = [
            judging.NewItem(
                f"order {n}",
                [{"role": "user", "content": f"Where is order {n}? I have been waiting for it since last week."}],
                [guess, {"messages": LOOKED_UP}],
            )
            for n in range(4)
        ]
        judging.add_items(session, project, items)
        for name, best in (("Ann", (0, 0)), ("Ben", (0, 1))):
            labeler = judging.ensure_labeler(session, name, "")
            for choice in best:
                task = handing.next_task(session, project, labeler)
                assert task is not None
                verdict = Verdict(ranking=[[choice], [1 - choice]], strength=2)
                given = judging.NewJudgement(
                    task.item.id, labeler.id, verdict, seconds=9, event_id=f"{name}{task.item.id}"
                )
                judging.record(session, project, given)
        return project.id


def worked(store: Store) -> None:
    """A day of answers by two versions of weights, with refusals, errors and judgements."""
    now = dt.datetime.now(dt.UTC)
    with store.transaction() as session:
        for n in range(120):
            at = now - dt.timedelta(minutes=11 * n)
            version = "weights-000020" if n < 50 else "weights-000010"
            outcome = "UnavailableError" if n % 17 == 0 else "length" if n % 9 == 0 else "stop"
            session.add(
                Audit(
                    at=at, request_id=f"request-{n}", action="answer", outcome=outcome, tenant="acme", key_id="k1",
                    customer="C-A", answer_id=f"answer-{n}", weights_version=version, prompt_tokens=200 + n,
                    completion_tokens=40, milliseconds=400 + 7 * (n % 40), first_token_milliseconds=60,
                    records=[{"system": "erp", "record": f"order/{n}"}],
                )
            )  # fmt: skip
            session.add(Answer(id=f"answer-{n}", prompt=[], answer="yes", created_at=at, weights_version=version))
            if n % 5 == 0:
                session.add(
                    FeedbackEvent(
                        customer="", event_id=str(n), answer_id=f"answer-{n}", kind="thumbs", received_at=at,
                        value="down" if n % 3 == 0 else "up",
                    )
                )  # fmt: skip
            if n % 13 == 0:
                outcome = "RateLimitedError" if n % 2 else "UnauthenticatedError"
                session.add(
                    Audit(
                        at=at, request_id=f"refused-{n}", action="refused", outcome=outcome, tenant="acme", key_id="",
                        customer="", records=[{"count": 3, "paths": ["/v1/chat/completions"]}],
                    )
                )  # fmt: skip


async def test_every_page_at_every_width_and_colour(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    scopes = ["chat", "feedback", "act", "label", "operate", "admin"]
    key = create_key(store, "acme", scopes, note="Olga")
    project, _ = labelled(store), worked(store)
    given: dict[str, Any] = {"database": database, "requireApiKey": True, "suggestions": ["Where is my order?"]}
    async with browsing(**given) as (page, _, policy, url):
        policy.reply = lambda request: MARKDOWN
        await page.goto(url)
        await every_look(page, "chat-signed-out")
        await page.goto(f"{url}/operator")
        await every_look(page, "sign-in")
        await page.fill("#key", key)
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#answers")
        assert await page.locator(".marks li").count() == 2, "both weights began to serve in this time"
        await every_look(page, "operator")
        await page.click("text=7 days")
        await page.wait_for_selector("[aria-current=true]:text('7 days')")
        await page.click("text=Audit trail")
        await page.fill("#q", "order/7")
        await page.click("text=Find")
        await page.wait_for_selector("#lines tbody tr >> nth=0")
        assert "answer-7" in await page.inner_text("#lines")
        await every_look(page, "audit")
        await page.click(".places >> text=Chat")
        await page.click("text=Where is my order?")
        await page.wait_for_selector(".tools")
        await page.click(".down")
        await page.wait_for_selector(".reason")
        await every_look(page, "chat")
        for name, path in (
            ("projects", "/label"),
            ("task", f"/label/{project}"),
            ("own", f"/label/{project}/me"),
            ("agreement", f"/label/{project}/agreement"),
            ("items", f"/label/{project}/items"),
            ("item", f"/label/{project}/items/1"),
            ("settings", f"/label/{project}/settings"),
        ):
            await page.goto(url + path)
            await every_look(page, name)
        await page.goto(f"{url}/keys")
        await page.click("text=Make a key")
        await page.wait_for_selector(".key")
        for summary in ("Change", "Rotate", "Revoke"):
            await page.click(f".key >> summary:has-text('{summary}')")
        await every_look(page, "keys")
        await page.goto(f"{url}/label/nowhere")
        await every_look(page, "error")
