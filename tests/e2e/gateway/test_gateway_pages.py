"""The chat and operator pages in a real Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from gateway_browser import PHONE, accessible, browsing, fits, shoot
from gateway_erp import Identities, TrytonServer

from services.gateway.auth.keys import create_key
from services.gateway.store import open_store
from steersman.store.models import FeedbackEvent

pytestmark = pytest.mark.browser


async def test_chat_streams_and_takes_judgements() -> None:
    async with browsing() as (page, gateway, policy, url):
        await page.goto(url)
        await page.wait_for_selector("#question:focus")  # without a click
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
        await accessible(page)
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


async def test_chat_shows_where_facts_come_from(identities: Identities, tryton: TrytonServer) -> None:
    tools = {"systems": [tryton.system(tryton.url)]}
    async with browsing(identity=identities.config, tools=tools) as (page, _, policy, url):
        policy.reply = lambda request: request.messages[0].content.splitlines()[-1]
        await page.goto(f"{url}/#customer={identities.token('C-A')}")
        await page.fill("#question", "where is my order 2?")
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".sources")
        assert await page.inner_text(".sources li") == "erp · order/2"
        assert '"shipping": "sent"' in await page.inner_text(".turn.assistant")
        await shoot(page, "chat-sources")
        await accessible(page)


async def test_chat_offers_questions_shows_markdown_and_keeps_the_conversation() -> None:
    async with browsing(suggestions=["Where is my order?"]) as (page, _, policy, url):
        policy.reply = lambda request: (
            "It is **packed**:\n\n- one\n- [more](https://example.com)\n\n<img src=x> ![p](//x)"
        )
        await page.goto(url)
        await shoot(page, "chat-welcome")
        await accessible(page)
        await page.click("text=Where is my order?")
        await page.wait_for_selector(".tools")
        answer = page.locator(".turn.assistant")
        assert await answer.locator("strong").inner_text() == "packed"
        assert await answer.locator("li").count() == 2
        assert await answer.locator("a").first.get_attribute("rel") == "noopener noreferrer nofollow"
        assert await answer.locator("img").count() == 0  # neither as HTML nor as Markdown
        await page.click(".down")
        await page.fill(".reason input", "Too short")
        await page.click(".reason button")
        await page.wait_for_selector(".tools:not(:has(.reason))")
        await shoot(page, "chat-markdown")
        await accessible(page)
        await page.reload()
        await page.wait_for_selector(".tools")
        assert await answer.locator("strong").inner_text() == "packed"
        await page.fill("#question", "and now?")
        await page.click("#send")
        await page.locator(".tools").nth(1).wait_for()
        assert [m.role for m in policy.requests[-1].messages] == ["user", "assistant", "user"]
        await page.click("#new")
        await page.reload()
        assert await page.locator(".turn").count() == 0


async def test_a_question_that_failed_stays_and_is_sent_again() -> None:
    async with browsing() as (page, _, policy, url):
        await page.goto(url)
        broken = 'data: {"error": {"message": "The engine went away"}}\n\n'
        await page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=broken))
        await page.fill("#question", "are you there?")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("text=Send again")
        assert await page.inner_text(".turn.user") == "are you there?"
        assert "The engine went away" in await page.inner_text(".turn.assistant")
        await shoot(page, "chat-failed")
        await accessible(page)
        await page.unroute("**/v1/chat/completions")
        await page.click("text=Send again")
        await page.wait_for_selector(".tools")
        assert await page.locator(".turn").count() == 2
        assert [m.content for m in policy.requests[-1].messages] == ["are you there?"]


async def test_a_new_conversation_while_an_answer_streams_has_nothing_of_the_old_one() -> None:
    async with browsing() as (page, _, policy, url):
        policy.seconds_per_token = 0.05
        policy.reply = lambda request: "word " * 200
        await page.goto(url)
        await page.fill("#question", "go")
        await page.keyboard.press("Enter")
        await page.locator(".turn.assistant", has_text="word").wait_for()
        await page.click("#new")
        policy.reply = lambda request: "fresh"
        await page.fill("#question", "again")
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".tools")
        assert await page.locator(".turn").all_inner_texts() == ["again", "fresh"]
        assert [m.content for m in policy.requests[-1].messages] == ["again"]


async def test_who_may_only_label_is_led_there_and_out_again(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    labeler = create_key(open_store(database), "acme", ["label"], note="Lea")
    async with browsing(database=database, requireApiKey=True) as (page, _, _, url):
        await page.goto(url)
        await page.click("text=Sign in")
        await page.fill("#key", labeler)
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/label")
        await page.goto(url)
        assert await page.locator("nav >> text=Labelling").count() == 1
        assert await page.locator("nav >> text=Operation").count() == 0
        await page.click("text=Sign out")
        await page.wait_for_url("**/login")


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


async def test_pages_need_the_right_key(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    operator = create_key(store, "acme", ["operate", "chat", "feedback"], note="Olga")
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
        await page.click(".down")
        await page.wait_for_selector(".down[aria-pressed=true]")
        await page.goto(f"{url}/operator")
        assert await page.inner_text("#answers") == "1"
        versions = await page.inner_text("h2:has-text('Versions') + table")
        assert "thumbs down: 1" in versions
        await shoot(page, "operator")
        await accessible(page)
        await page.set_viewport_size(PHONE)
        assert await fits(page)
        answer = await page.request.get(f"{url}/label")
        assert answer.status == 403
        assert "lacks the scope" in await answer.text()
