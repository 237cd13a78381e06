"""Somebody who looks at the status page with a browser, and what else the browser was up to meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, Page, expect

from tests.support.host import LISTEN

URL = f"http://{LISTEN}/"
HOST = "gpu-3"
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)


class Looker:
    """A window on the page; `requests` are the addresses that it asked, `said` is what stands in its console."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.said: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: (self.said.append(f"dialog {dialog.message}"), dialog.dismiss()))

    @classmethod
    @contextlib.contextmanager
    def at(cls, browser: Browser, url: str, width: int = 1200, **more: Any) -> Iterator[Looker]:
        """Looks until the end of the block, which is clean."""
        before = more.pop("before", "")
        context = browser.new_context(viewport={"width": width, "height": 800}, **more)
        try:
            looker = cls(context.new_page())
            if before:
                looker.page.add_init_script(before)
            looker.page.goto(url)
            yield looker
            looker.assert_clean()
        finally:
            context.close()

    def assert_clean(self) -> None:
        """Nobody else was asked, and the browser has found nothing wrong."""
        assert {urlsplit(url).netloc for url in self.requests if not url.startswith("data:")} == {LISTEN}
        assert self.said == []

    def row(self, name: str) -> Locator:
        """A tenant on its first device that stands there."""
        return self.page.locator("tbody tr").filter(has=self.page.get_by_text(name, exact=True)).first

    def cell(self, name: str, column: str) -> Locator:
        """One figure of it."""
        return self.row(name).locator(f'td[data-name="{column}"]')

    def names(self) -> list[str]:
        """The tenants as they stand one below the other."""
        return self.page.locator("tbody th > bdi").all_inner_texts()

    def marked(self) -> bool:
        """Still the page that `mark` has marked: it was not loaded anew."""
        return bool(self.page.evaluate("window.marked === true"))

    def mark(self) -> None:
        """So that one can tell whether it was loaded anew."""
        self.page.evaluate("window.marked = true")

    def evaluate(self, expression: str) -> Any:
        """What a script in the page would see."""
        return self.page.evaluate(expression)
