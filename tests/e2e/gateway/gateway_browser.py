"""A real Chromium before a real gateway. SCREENSHOTS=DIR keeps pictures of the pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.gateway.testing import gateway_config, running_gateway
from steersman.testing.fake_policy import FakePolicy, serve_policy

PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 800}
ELSEWHERE = "steersman.example"
PATIENCE = 150_000
"""Milliseconds to wait for anything: a busy machine is no failure."""


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
        # A name that is not this machine's own: over plain http it is no secure context, as in an office network.
        arguments = ["--no-sandbox", f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1"]
        browser = await driver.chromium.launch(executable_path=chromium, args=arguments)
        page = await browser.new_page()
        page.context.set_default_timeout(PATIENCE)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if _is_fault(message) else None)
        try:
            yield page, gateway, policy, gateway.url
            assert not errors, errors
        finally:
            await browser.close()


def _is_fault(message: Any) -> bool:
    """Neither a request that the gateway refused is a fault of the page, nor that plain http is no secure context."""
    harmless = ("the server responded with a status of 4", "Cross-Origin-Opener-Policy header has been ignored")
    return message.type == "error" and not any(text in message.text for text in harmless)


async def new_page(page: Any, **settings: Any) -> Any:
    """A page for somebody else: with cookies of its own."""
    context = await page.context.browser.new_context(**settings)
    context.set_default_timeout(PATIENCE)
    return await context.new_page()


async def shoot(page: Any, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        await page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


async def fits(page: Any) -> bool:
    """Nothing is wider than the window."""
    return await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


async def accessible(page: Any) -> None:
    """axe finds no fault: names, roles, contrast, landmarks (WCAG 2.2 A and AA, and axe's best practices)."""
    axe = pytest.importorskip("axe_playwright_python.async_playwright", reason="axe is not installed (extra `dev`)")
    found = await axe.Axe().run(page)
    assert found.response["violations"] == [], found.generate_report()


async def every_look(page: Any, name: str) -> None:
    """The page as it is, on a phone and on a desk, light and dark: it fits, and axe finds no fault."""
    for size, width in (("phone", PHONE), ("desk", DESK)):
        await page.set_viewport_size(width)
        assert await fits(page), f"{name} is wider than a {size}"
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            await shoot(page, f"{name}-{size}-{scheme}")
            await accessible(page)
