"""The console in a real browser: scripts, keyboard, colours, and what axe-core finds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from server.requests.settings import RequestSettings
from tests.support.browser import browser, browser_path, log_in, violations
from tests.support.tiny import TinyBundles

from .conftest import TOKEN, Listening
from .test_console import FORGET, RETAIN

pytestmark = pytest.mark.skipif(browser_path() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def server(make_stack: Callable[..., Any], plan: Callable[..., None]) -> Iterator[Listening]:
    found = Listening(lambda: make_stack(requests=RequestSettings()))
    with contextlib.closing(found):
        yield found


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """That asked for nothing elsewhere, and had no error, once the test has ended."""
    # Without transitions, or axe-core would see colours on their way.
    context = chromium.new_context(reduced_motion="reduce")
    found, wrong, hosts = context.new_page(), [], set()
    found.on("console", lambda message: wrong.append(message.text))
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    yield found
    context.close()
    assert [text for text in wrong if "status of 422" not in text] == []
    assert hosts <= {"127.0.0.1", ""}


def flaws(page: Page) -> list[str]:
    """What axe-core finds, light and dark."""
    found = []
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        found += [f"{scheme}: {each}" for each in violations(page)]
    return found


def test_a_takedown_by_keyboard(server: Listening, page: Page, bundles: TinyBundles) -> None:
    log_in(page, server.url, TOKEN)
    assert flaws(page) == []
    page.get_by_role("link", name="Domains").press("Enter")
    page.get_by_role("button", name="Activate a bundle").press("Enter")
    page.get_by_label("Name of the domain").fill("authors")
    page.get_by_label("Bundle").fill(str(bundles.experts["domain-0"]))
    assert flaws(page) == []
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading")).to_have_text("Activate authors?")
    page.get_by_label("Case number").fill("case 12/26")
    assert flaws(page) == []
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Epoch 1 holds everywhere")
    assert flaws(page) == []

    page.get_by_role("link", name="To the domains").press("Enter")
    revoke = page.get_by_role("link", name="Revoke authors")
    revoke.focus()
    assert flaws(page) == []
    revoke.press("Enter")
    page.get_by_role("button", name="Revoke").press("Enter")  # refused by the browser: not ticked
    expect(page.get_by_role("heading")).to_have_text("Revoke authors?")
    page.get_by_label("The answers may come back").press("Space")
    assert flaws(page) == []
    page.get_by_role("button", name="Revoke").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Epoch 2 holds everywhere")
    assert server.stack.service.list() == ()


def test_pages_show_what_others_change_and_keep_the_focus(
    server: Listening, page: Page, bundles: TinyBundles
) -> None:
    stack = server.stack
    server.run(stack.activate("authors", bundles.experts["domain-0"]))
    log_in(page, server.url, TOKEN)
    page.goto(f"{server.url}/console/domains")
    page.get_by_role("link", name="Revoke authors").focus()
    server.run(stack.activate("novel", bundles.experts["domain-1"]))
    expect(page.get_by_role("link", name="Revoke novel")).to_be_visible(timeout=15_000)
    assert page.evaluate("document.activeElement.id") == "revoke-authors"
    page.goto(f"{server.url}/console/")
    expect(page.get_by_role("status")).to_contain_text("Epoch 2 holds everywhere")
    server.run(stack.revoke("novel"))
    expect(page.get_by_role("status")).to_contain_text("Epoch 3 holds everywhere")


def test_a_request_step_by_step(server: Listening, page: Page, tmp_path: Path) -> None:
    files = {"forget.jsonl": FORGET, "retain.jsonl": RETAIN}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    log_in(page, server.url, TOKEN)
    page.get_by_role("link", name="Requests").click()
    assert flaws(page) == []
    page.get_by_role("button", name="Ask for a domain to be forgotten").click()
    following = page.get_by_role("button", name="Next")
    following.click()  # held up: there is no name
    expect(page.get_by_label("Files")).to_be_hidden()
    page.get_by_label("Name of the domain").fill("glass")
    page.get_by_label("Case number").fill("case 7")
    assert flaws(page) == []
    page.keyboard.press("Enter")
    page.get_by_label("Files").set_input_files(tmp_path / "forget.jsonl")
    assert flaws(page) == []
    following.click()
    page.get_by_role("button", name="Back").click()
    following.click()
    page.get_by_label("Retain sample").set_input_files(tmp_path / "retain.jsonl")
    page.get_by_label("Ask in any case").check()
    assert flaws(page) == []
    page.get_by_role("button", name="Send the request").click()
    expect(page.get_by_text("Activate it?")).to_be_visible(timeout=20_000)
    assert flaws(page) == []
    page.get_by_role("button", name="Approve").click()
    assert flaws(page) == []
    page.get_by_role("button", name="Approve").click()
    expect(page.get_by_text(re.compile("^deleted 2"))).to_be_visible(timeout=20_000)
    assert flaws(page) == []
    with page.expect_download() as download:
        page.get_by_role("link", name="envelope alone").click()
    assert download.value.suggested_filename == "evidence-glass.json"
    page.get_by_role("link", name="certificate", exact=True).click()
    expect(page.get_by_role("heading", name="Unlearning certificate")).to_be_visible()
    assert flaws(page) == []
    assert page.evaluate("getComputedStyle(document.body).maxWidth") == "960px"  # its own style


def test_a_trace_as_a_heat_map(server: Listening, page: Page, bundles: TinyBundles) -> None:
    server.run(server.stack.activate("authors", bundles.experts["domain-0"]))
    log_in(page, server.url, TOKEN)
    page.get_by_role("link", name="Trace").click()
    assert flaws(page) == []
    page.get_by_label("Text", exact=True).fill("who blows glass <here>")
    page.get_by_role("button", name="Trace").click()
    heat = page.locator("#heat")
    expect(heat).to_contain_text("<here>")
    colours = page.evaluate(
        "[...document.querySelectorAll('#heat span')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert all("rgba" in each and not each.endswith(", 0)") for each in colours)
    expect(page.locator("#current-answer")).to_have_text("<who blows glass <here>>")
    page.get_by_text("All tokens as a table").click()
    expect(page.get_by_role("table")).to_contain_text("authors 0.50")
    assert flaws(page) == []


def test_problems_and_the_login(server: Listening, page: Page) -> None:
    page.goto(f"{server.url}/console/")
    assert flaws(page) == []
    log_in(page, server.url, TOKEN)
    page.goto(f"{server.url}/console/domains/Nobody/revoke")
    expect(page.get_by_role("alert")).to_contain_text("name")
    assert flaws(page) == []
    page.goto(f"{server.url}/console/")
    page.get_by_role("button", name=re.compile("Log out")).click()
    expect(page.get_by_role("heading")).to_have_text("Log in")
