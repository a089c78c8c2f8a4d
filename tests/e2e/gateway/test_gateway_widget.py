"""The chat on a page of another site, which has a strict content security policy, in a real Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_browser import PHONE, accessible, browsing, fits, shoot
from gateway_erp import Identities
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.gateway.auth.keys import create_key
from services.gateway.store import open_store
from services.gateway.testing import gateway_config, running_gateway, serve_app
from steersman.testing.fake_policy import FakePolicy, serve_policy

ORDERS = (
    '{"order": [{"number": "2", "owner": "C-A", "state": "sent"}, {"number": "3", "owner": "C-B", "state": "lost"}]}'
)
FIELDS = {"number": "number", "state": "state"}
KINDS = {"order": {"entity": "order", "number": "number", "owner": "owner", "fields": FIELDS}}


class Site:
    """A shop's page with the script tag."""

    def __init__(self) -> None:
        self.gateway = ""
        self.settings = ""
        self.app = Starlette(routes=[Route("/", self.page)])

    async def page(self, request: Request) -> Response:
        script = f'<script src="{self.gateway}/widget.js" data-title="Ask us" {self.settings} async></script>'
        policy = f"default-src 'none'; script-src {self.gateway}; frame-src {self.gateway}; style-src 'none'"
        body = f'<!doctype html><html lang="en"><title>Shop</title><main><h1>Shop</h1></main>{script}</html>'
        return Response(body, media_type="text/html", headers={"content-security-policy": policy})


@pytest.mark.browser
async def test_the_chat_stands_on_a_strict_page_of_another_site(identities: Identities, tmp_path: Path) -> None:
    database, records = f"sqlite:///{tmp_path}/g.db", tmp_path / "orders.json"
    records.write_text(ORDERS)
    key = create_key(open_store(database), "acme", ["chat", "act", "feedback"])
    system = {"name": "shop", "type": "file", "path": str(records), "kinds": KINDS}
    site = Site()
    async with serve_app(site.app) as shop:
        given: dict[str, Any] = {
            "embedOrigins": [shop], "database": database, "requireApiKey": True, "identity": identities.config,
            "tools": {"systems": [system]},
        }  # fmt: skip
        async with browsing(**given) as (page, _, policy, url):
            policy.reply = lambda request: "\n".join(message.content for message in request.messages)
            site.gateway, site.settings = url, f'data-key="{key}" data-customer="{identities.token("C-A")}"'
            await page.goto(shop)
            await page.click("text=Ask us")
            chat = page.frame_locator("iframe")
            await chat.locator("#question").fill("where is my order 2?")
            await chat.locator("#send").click()
            await chat.locator(".sources li").wait_for()
            assert "sent" in await chat.locator(".turn.assistant").inner_text()
            await chat.locator(".up").click()
            await chat.locator(".up[aria-pressed=true]").wait_for()
            await shoot(page, "widget")
            await accessible(page)
            await chat.locator("#question").press("Escape")
            await page.locator("iframe").wait_for(state="hidden")
            await page.set_viewport_size(PHONE)
            await page.click("text=Ask us")
            assert await fits(page)
            await shoot(page, "widget-phone")
            # Somebody else logs in: neither the conversation nor the records of the first are his.
            await page.evaluate("token => steersmanChat.customer(token)", identities.token("C-B"))
            await chat.locator(".welcome").wait_for()
            assert await chat.locator(".turn").count() == 0
            await chat.locator("#question").fill("where is my order 2?")
            await chat.locator("#send").click()
            await chat.locator(".tools").wait_for()
            assert await chat.locator(".sources li").count() == 0


async def test_the_chat_stands_on_no_site_that_is_not_named() -> None:
    async with serve_policy(FakePolicy()) as endpoint, httpx.AsyncClient() as http:
        async with running_gateway(gateway_config(endpoint)) as gateway:
            for path in ("/widget", "/widget.js"):
                answer = await http.get(gateway.url + path)
                assert (answer.status_code, "embedOrigins" in answer.text) == (404, True)
        named = gateway_config(endpoint, embedOrigins=["https://www.example.com"])
        async with running_gateway(named) as gateway:
            page = await http.get(f"{gateway.url}/widget")
            assert "frame-ancestors https://www.example.com;" in page.headers["content-security-policy"]
            assert page.headers.get_list("content-security-policy") == [page.headers["content-security-policy"]]
            script = await http.get(f"{gateway.url}/widget.js")
            assert script.headers["cross-origin-resource-policy"] == "cross-origin"
            assert "frame-ancestors 'none'" in (await http.get(gateway.url)).headers["content-security-policy"]
