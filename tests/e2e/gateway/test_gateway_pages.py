"""The pages in a real Chromium. SCREENSHOTS=DIR keeps pictures of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from services.gateway.auth.keys import create_key
from services.gateway.store import open_store
from services.gateway.testing import gateway_config, running_gateway
from steersman.store.engine import Store
from steersman.store.judging import NewItem, add_items, create_project
from steersman.store.models import FeedbackEvent, Judgement
from steersman.testing.fake_policy import FakePolicy, serve_policy

pytestmark = pytest.mark.browser
PHONE = {"width": 360, "height": 740}


@asynccontextmanager
async def browsing(**changes: Any) -> AsyncIterator[tuple[Any, Any, FakePolicy, str]]:
    """(page, gateway, policy, url) with every error of the page's scripts and console collected."""
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed (extra `dev`)")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    policy = FakePolicy(seconds_per_token=0.01)
    async with (
        serve_policy(policy) as endpoint,
        running_gateway(gateway_config(endpoint, **changes)) as gateway,
        playwright.async_playwright() as driver,
    ):
        browser = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        try:
            yield page, gateway, policy, gateway.url
            assert errors == []
        finally:
            await browser.close()


async def shoot(page: Any, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        await page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


async def fits(page: Any) -> bool:
    """Nothing is wider than the window."""
    return await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


async def test_chat_streams_and_takes_judgements() -> None:
    async with browsing() as (page, gateway, policy, url):
        await page.goto(url)
        await page.keyboard.type("where is my <b>parcel</b>?")
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".tools")
        said = await page.inner_text(".turn.assistant")
        assert said == "You said: where is my <b>parcel</b>?"
        await page.click(".up")
        await page.wait_for_selector(".up[aria-pressed=true]")
        await page.click(".edit")
        await page.fill(".tools textarea", "It arrives tomorrow.")
        await page.click("text=Save")
        await page.wait_for_selector(".tools:not(:has(textarea))")
        await shoot(page, "chat")
        await page.fill("#question", "and then?")
        await page.click("#send")
        await page.locator(".tools").nth(1).wait_for()
        assert [m.role for m in policy.requests[1].messages] == ["user", "assistant", "user"]
        with gateway.store.reading() as session:
            events = {e.kind: e.value for e in session.scalars(sa.select(FeedbackEvent))}
        assert events == {"thumbs": "up", "edit": "It arrives tomorrow."}
        await page.set_viewport_size(PHONE)
        assert await fits(page)
        await shoot(page, "chat-phone")


async def test_chat_stops_when_told_to() -> None:
    async with browsing() as (page, _, policy, url):
        policy.seconds_per_token = 0.05
        policy.reply = lambda request: "word " * 500
        await page.goto(url)
        await page.fill("#question", "go")
        await page.keyboard.press("Enter")
        await page.locator(".turn.assistant", has_text="word").wait_for()
        await page.click("#stop")
        await page.wait_for_selector("#send:visible")
        await page.wait_for_timeout(300)
        assert policy.running == 0
        assert policy.cancelled == 1


def _project(store: Store, kind: str, n: int = 3, **settings: Any) -> int:
    with store.transaction() as session:
        project = create_project(
            session, f"{kind} answers", kind, guidelines="Be **fair**.\n\n- polite\n- true", **settings
        )
        count = {"compare": 2, "rank": 3}.get(kind, 1)
        items = [
            NewItem(
                key=str(i),
                prompt=[{"role": "user", "content": f"question {i} <script>alert(1)</script>"}],
                candidates=[{"messages": [{"role": "assistant", "content": f"answer {i}-{c}"}]} for c in range(count)],
            )
            for i in range(n)
        ]
        add_items(session, project, items)
        return project.id


async def _log_in(page: Any, url: str, project: int) -> None:
    await page.goto(f"{url}/label/{project}")
    await page.goto(f"{url}/login?next=/label/{project}")
    await page.fill("#name", "Lena")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#task")


def _verdicts(store: Store) -> list[Judgement]:
    with store.reading() as session:
        return list(session.scalars(sa.select(Judgement).where(Judgement.undone_at.is_(None)).order_by(Judgement.id)))


async def test_comparing_by_keyboard_with_skip_flag_and_undo() -> None:
    async with browsing() as (page, gateway, _, url):
        project = _project(gateway.store, "compare")
        await _log_in(page, url, project)
        assert "<script>alert(1)</script>" in await page.inner_text(".conversation")
        assert await page.inner_text("aside strong") == "fair"
        await shoot(page, "compare")
        shown = [await page.inner_text(f".answer:nth-child({n}) .text") for n in (1, 2)]
        await page.keyboard.press("2")
        await page.locator("#progress", has_text="1 done").wait_for()
        (verdict,) = _verdicts(gateway.store)
        best = verdict.verdict["ranking"][0][0]
        assert shown[0].endswith(f"-{best}")
        assert verdict.verdict["strength"] == 2
        await page.keyboard.press("u")
        await page.locator("#progress", has_text="0 done").wait_for()
        assert _verdicts(gateway.store) == []
        for key, done in (("4", "1 done"), ("s", "2 done")):
            await page.keyboard.press(key)
            await page.locator("#progress", has_text=done).wait_for()
        await page.keyboard.press("f")
        assert await page.is_checked("[name=unsafe]")
        await page.keyboard.press("7")
        await page.wait_for_selector("text=Nothing is left for you")
        tie, skipped, unsafe = (judgement.verdict for judgement in _verdicts(gateway.store))
        assert len(tie["ranking"]) == 1
        assert skipped["skip"]
        assert unsafe["unsafe"]


async def test_ranking_rating_and_editing() -> None:
    async with browsing() as (page, gateway, _, url):
        rank = _project(gateway.store, "rank", 1)
        await _log_in(page, url, rank)
        for place, value in enumerate(("2", "1", "2")):
            await page.select_option(f"#rank{place}", value)
        await shoot(page, "rank")
        await page.keyboard.press("Control+Enter")
        await page.wait_for_selector("text=Nothing is left for you")

        rate = _project(gateway.store, "rate", 1, aspects=["helpful", "polite"])
        await page.goto(f"{url}/label/{rate}")
        await page.keyboard.press("5")
        await page.keyboard.press("3")
        await shoot(page, "rate")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("text=Nothing is left for you")

        edit = _project(gateway.store, "edit", 1)
        await page.goto(f"{url}/label/{edit}")
        await page.fill("#edit", "A better\nanswer")
        await page.set_viewport_size(PHONE)
        assert await fits(page)
        await shoot(page, "edit-phone")
        await page.click("text=Save")
        await page.wait_for_selector("text=Nothing is left for you")
        ranked, rated, edited = (judgement.verdict for judgement in _verdicts(gateway.store))
        assert [len(group) for group in ranked["ranking"]] == [1, 2]
        assert rated["ratings"] == {"helpful": 5, "polite": 3}
        assert edited["edit"] == "A better\nanswer"


async def test_pages_need_the_right_key(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    operator = create_key(store, "acme", ["operate", "chat"], note="Olga")
    async with browsing(database=database, requireApiKey=True) as (page, _, _, url):
        await page.goto(f"{url}/operator")
        assert page.url.endswith("/login?next=/operator")
        await page.fill("#key", operator)
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#answers")
        assert await page.inner_text("#answers") == "0"
        await page.goto(url)
        await page.fill("#question", "hello")
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".tools")
        await page.goto(f"{url}/operator")
        assert await page.inner_text("#answers") == "1"
        await shoot(page, "operator")
        await page.set_viewport_size(PHONE)
        assert await fits(page)
        answer = await page.request.get(f"{url}/label")
        assert answer.status == 403
        assert "lacks the scope" in await answer.text()
