"""The console in headless Chromium: its first load, and what axe-core finds on its pages, light and dark."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page

from tests.support.browser import browser, log_in, violations

from .settings import Settings
from .world import World

SCHEMES = ("light", "dark")
SHOWN = (("trace", "light"), ("request", "dark"))
"""On the README's first page."""
SIZE = {"width": 1200, "height": 900}


def measure(world: World, settings: Settings, images: Path) -> dict[str, Any]:
    """Bytes and seconds of the first load after a login, violations, and screenshots."""
    server = world.server
    with browser() as chromium:
        loads = [_first_load(chromium, world) for _ in range(settings.num_loads)]
        found = {}
        for scheme in SCHEMES:
            context = chromium.new_context(
                color_scheme=scheme, viewport=SIZE, reduced_motion="reduce"
            )
            page = context.new_page()
            page.goto(f"{server.url}/console/login")
            found[f"login, {scheme}"] = violations(page)
            log_in(page, server.url, server.admin_token)
            for name in _pages(page, world):
                found[f"{name}, {scheme}"] = violations(page)
                if (name, scheme) in SHOWN:
                    images.mkdir(parents=True, exist_ok=True)
                    page.screenshot(
                        path=images / f"console-{name}-{scheme}.png", full_page=name == "trace"
                    )
            context.close()
    return {
        "console_bytes": max(size for size, _ in loads),
        "console_load_s": statistics.median(seconds for _, seconds in loads),
        "axe_violations": sum(map(len, found.values())),
        "spread": {"console_load_s": (min(s for _, s in loads), max(s for _, s in loads))},
        "notes": {"pages": found},
    }


def _first_load(chromium: Browser, world: World) -> tuple[int, float]:
    """Bytes over the wire and seconds until the page is loaded, with nothing in the cache but the cookie."""
    context = chromium.new_context()
    page = context.new_page()
    log_in(page, world.server.url, world.server.admin_token)
    cookies = context.cookies()
    context.close()
    context = chromium.new_context()
    context.add_cookies(cookies)
    page, sizes = context.new_page(), []

    def note(request: Any) -> None:
        found = request.sizes()
        sizes.append(found["responseBodySize"] + found["responseHeadersSize"])

    page.on("requestfinished", note)
    page.goto(f"{world.server.url}/console/", wait_until="load")
    timing = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    context.close()
    return sum(sizes), timing / 1000


def _pages(page: Page, world: World) -> Iterator[str]:
    """Goes from page to page, as an operator does; the name of each."""
    page.get_by_role("heading", name="Fleet").wait_for()
    yield "fleet"
    page.get_by_role("link", name="Domains").click()
    page.get_by_role("button", name="Activate a bundle").click()
    yield "activate"
    page.get_by_label("Name of the domain").fill("authors")
    page.get_by_label("Bundle").fill(str(world.expert))
    page.get_by_role("button", name="Go on").click()
    yield "confirmation"
    page.get_by_role("button", name="Activate").click()
    page.get_by_text("holds everywhere").wait_for()
    yield "operation"
    page.get_by_role("link", name="Trace").click()
    question = next(iter(world.corpus.domains.values()))[0].question
    page.get_by_label("Text", exact=True).fill(question)
    page.get_by_role("button", name="Trace").click()
    page.locator("#heat").wait_for(timeout=120_000)
    yield "trace"
    page.get_by_role("link", name="Requests").click()
    page.get_by_role("button", name="Ask for a domain").click()
    yield "new request"
    page.get_by_role("link", name="Requests").click()
    yield "requests"
    if (row := page.locator("tbody th a").first).count():
        row.click()
        yield "request"
    page.get_by_role("link", name="Domains").click()
    page.get_by_text("authors").wait_for()
    yield "domains"
    page.get_by_role("link", name="Revoke").first.click()
    yield "revocation"
    page.get_by_label("The answers may come back").check()
    page.get_by_role("button", name="Revoke").click()
    page.get_by_text("holds everywhere").wait_for()
    page.goto(f"{world.server.url}/console/nowhere")
    yield "problem"
    page.goto(f"{world.server.url}/console/")
