"""Headless Chromium, where the machine has one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browser_path() -> str | None:
    """Where one is."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Headless. Raises: FileNotFoundError if there is none."""
    path = browser_path()
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
    with sync_playwright() as playwright:
        # Its sandbox wants privileges that containers lack; it sees nothing but our own pages.
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


def log_in(page: Page, url: str, token: str) -> None:
    """As a person would, by keyboard."""
    page.goto(f"{url}/console")
    page.get_by_label("Admin token").fill(token)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Fleet").wait_for()


def violations(page: Page) -> list[str]:
    """What axe-core finds: the rules that a page breaks, and where."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {node['html'][:160]}" for each in found for node in each["nodes"]]
