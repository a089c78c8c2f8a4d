"""The chat and operator pages in a real Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from gateway_browser import ELSEWHERE, PHONE, accessible, browsing, fits, new_page, shoot
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
            "It is **packed**:\n\n- one\n- [more](https://example.com)\n\n<img src=x> ![p](//x) [no](javascript:x())"
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
        protocols = await answer.locator("a").evaluate_all("(links) => links.map((link) => link.protocol)")
        assert set(protocols) <= {"http:", "https:"}, "a script is no address"
        await page.click(".down")
        await page.fill(".reason input", "Too short")
        await page.click(".reason button")
        await page.wait_for_selector(".tools:not(:has(.reason))")
        await shoot(page, "chat-markdown")
        await accessible(page)
        await page.reload()
        await page.wait_for_selector(".tools")
        assert await answer.locator("strong").inner_text() == "packed"
        assert await page.get_attribute(".down", "aria-pressed") == "true"
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
        await page.reload()  # neither the question nor what went wrong is forgotten
        assert await page.inner_text(".turn.user") == "are you there?"
        assert "The engine went away" in await page.inner_text(".turn.assistant")
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


async def test_thumbs_reach_the_gateway_over_plain_http_from_another_machine() -> None:
    async with browsing(allowedHosts=[ELSEWHERE]) as (page, gateway, _, url):
        await page.goto(url.replace("127.0.0.1", ELSEWHERE))
        assert not await page.evaluate("isSecureContext")
        await page.fill("#question", "hello")
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".tools")
        await page.click(".down")
        await page.fill(".reason input", "Too short")
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".tools:not(:has(.reason))")
        with gateway.store.reading() as session:
            said = session.scalars(sa.select(FeedbackEvent).where(FeedbackEvent.current)).one()
        assert (said.value, said.reason) == ("down", "Too short")


PROPOSED = {"id": "p1", "system": "desk", "action": "create_case", "text": "Hand this over to a person", "expires": 9e9}


async def test_a_proposed_action_is_a_card_that_is_confirmed_or_not() -> None:
    """The gateway's part is in test_gateway_tools.py; here the page's, with its answers written by hand."""
    async with browsing() as (page, _, _, url):
        about = {"answer_id": "a", "sources": [], "proposed_actions": [PROPOSED]}
        chunk = {"choices": [{"delta": {"content": "Shall I?"}}], "steersman": about}
        body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        await page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=body))
        answers = [{"json": {"error": {"message": "The desk is closed"}}, "status": 409}, {"json": {"text": "Case 7"}}]
        await page.route("**/v1/actions/p1/confirm", lambda route: route.fulfill(**answers.pop(0)))
        await page.goto(url)
        await page.fill("#question", "a person, please")
        await page.keyboard.press("Enter")
        card = page.locator(".proposal")
        await card.wait_for()
        assert "Hand this over to a person" in await card.inner_text()
        await accessible(page)
        await shoot(page, "chat-proposal")
        await card.locator("text=Confirm").click()
        await card.locator("text=The desk is closed").wait_for()
        await card.locator("text=Confirm").click()
        await card.locator("text=Case 7").wait_for()
        await page.reload()
        await card.locator("text=Case 7").wait_for()
        assert await card.locator("button").count() == 0, "what was done is not offered again"
        await page.click("#new")
        await page.fill("#question", "a person, please")
        await page.keyboard.press("Enter")
        await card.locator("text=Not now").click()
        await card.wait_for(state="detached")
        await page.reload()
        await page.wait_for_selector(".tools")
        assert await card.count() == 0


async def test_everybody_sees_the_ways_that_the_key_opens(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    ways = {
        "label": ["Labelling"],
        "chat": ["Chat"],
        "operate": ["Operation"],
        "admin": ["Keys"],
    }
    report = tmp_path / "report.html"
    report.write_text("<!doctype html><title>How it went</title>")
    async with browsing(database=database, requireApiKey=True, report=str(report)) as (page, _, _, url):
        for scopes in (["label"], ["operate"], ["admin"], ["chat", "label", "operate", "admin"]):
            key = create_key(store, "acme", scopes, note="Kim")
            mine = await new_page(page)
            await mine.goto(f"{url}/login")
            await mine.fill("#key", key)
            await mine.keyboard.press("Enter")
            await mine.wait_for_selector("text=Sign out")
            wanted = [
                name for scope in ("chat", "label", "operate", "admin") if scope in scopes for name in ways[scope]
            ]
            assert await mine.locator(".places a").all_inner_texts() == wanted
            for name in wanted:
                await mine.click(f".places >> text={name}")
                await mine.wait_for_selector(f".places [aria-current=page]:text-is('{name}')")
            answer = await mine.request.get(f"{url}/report")
            assert answer.status == (200 if "operate" in scopes else 403)
            assert "operate" not in scopes or "default-src 'none';" in answer.headers["content-security-policy"]
            await mine.goto(url)
            assert await mine.locator("text=Report").count() == ("operate" in scopes)
            await mine.click("text=Sign out")
            await mine.wait_for_url("**/login")
            await mine.context.close()


async def test_keys_are_made_changed_rotated_and_revoked_by_hand(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    boss = create_key(open_store(database), "acme", ["admin", "chat"], note="Boss")
    async with browsing(database=database, requireApiKey=True) as (page, _, _, url):
        await page.goto(f"{url}/keys")
        await page.fill("#key", boss)
        await page.keyboard.press("Enter")
        await page.click("text=Make a key")
        assert await page.locator("#make [name=scopes]").count() == 2, "no scope that the key itself lacks"
        await page.fill("#make [name=note]", "Shop <b>front</b>")
        await page.fill("#make [name=tokens_per_month]", "1000")
        await page.click("text=Make the key")
        await page.wait_for_selector("#made:visible")
        key = await page.inner_text("#made code")
        headers = {"authorization": f"Bearer {key}"}
        body = {"model": "steersman", "messages": [{"role": "user", "content": "hello"}]}
        answer = await page.request.post(f"{url}/v1/chat/completions", headers=headers, data=body)
        assert answer.status == 200
        await page.reload()
        card = page.locator(".key", has_text="Shop <b>front</b>")
        await card.wait_for()
        assert " of 1,000 tokens this month" in await card.inner_text()
        assert key not in await page.content(), "it is seen once"
        await card.locator("text=Change").click()
        await card.locator("[name=tokens_per_month]").fill("2000")
        await card.locator("text=Save").click()
        await card.locator("text=of 2,000 tokens this month").wait_for()
        await card.locator("summary >> text=Rotate").click()
        await card.locator("select").select_option("no time")
        await card.locator("text=Make its successor").click()
        await page.wait_for_selector("#made:visible")
        successor = await page.inner_text("#made code")
        assert successor != key
        for given, status in ((key, 401), (successor, 200)):
            headers = {"authorization": f"Bearer {given}"}
            answer = await page.request.post(f"{url}/v1/chat/completions", headers=headers, data=body)
            assert answer.status == status, given
        await card.locator("summary >> text=Revoke").click()
        await card.locator("text=Revoke this key").click()
        await card.wait_for(state="detached")
        answer = await page.request.post(f"{url}/v1/chat/completions", headers=headers, data=body)
        assert answer.status == 401
        await page.select_option("#state", "revoked")
        await card.locator("text=revoked").wait_for()
        await page.select_option("#state", "active")
        await page.locator(".key", has_text="Boss").wait_for()
        # What the gateway refuses is said in its words.
        await page.click("text=Make a key")
        for box in await page.locator("#make [name=scopes]").all():
            await box.uncheck()
        await page.click("text=Make the key")
        await page.wait_for_selector("#trouble:has-text('scopes')")
