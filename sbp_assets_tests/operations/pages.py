"""Chromium on Dagster's UI, for the tests and for the benchmark of its speed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
SCREENSHOTS = Path(os.environ.get("SBP_SCREENSHOTS", Path(__file__).resolve().parents[2] / "build/screenshots"))
# Only ends a test that hangs, also on a busy machine: pages are waited for, and runs that change them. Milliseconds.
PATIENCE = 300_000


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser that talks to nobody of its own accord."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            timeout=PATIENCE,
        )
        yield browser
        browser.close()


class Ui:
    """One tab on the webserver at `url`."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.url = url
        self.page: Page = browser.new_page(viewport={"width": 1440, "height": 900})
        self.page.set_default_timeout(PATIENCE)
        self.page.set_default_navigation_timeout(PATIENCE)

    def open(self, path: str) -> Ui:
        self.page.goto(self.url + path)
        return self

    def see(self, text: str, within: Locator | None = None) -> Locator:
        """Wait until `text` is seen, exactly and on its own."""
        found = (within or self.page).get_by_text(text, exact=True).locator("visible=true").first
        expect(found).to_be_visible(timeout=PATIENCE)
        return found

    def press(self, button: str, within: Locator | None = None) -> None:
        name = re.compile(rf"^\s*{re.escape(button)}…?\s*$")
        (within or self.page).get_by_role("button").filter(has_text=name).first.click()

    def asset(self, name: str, view: str = "overview", **query: str) -> Ui:
        """The page of asset `stage/name`."""
        return self.open(f"/assets/{name}?{urlencode({'view': view, **query})}")

    def metadata(self, name: str) -> Locator:
        """Row of the metadata table, on a partition's page or a check's."""
        row = self.page.locator("tr").filter(has=self.page.get_by_text(name, exact=True)).first
        expect(row).to_be_visible(timeout=PATIENCE)
        return row

    def shards(self, **counts: int) -> None:
        """Wait until the partitions page counts e.g. Materialized=2, Missing=0."""
        for status, count in counts.items():
            self.see(f"{status} ({count})")

    def picture(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", animations="disabled")
