"""A browser window on the web page, and all requests and messages of the browser."""

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
    """A window on the page. `requests` are the addresses that it requested, `said` is the text of its console."""

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
        """Open the page until the end of the block, and check that it is clean."""
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
        """Check that no other host was contacted, and that the browser reported no error."""
        assert {urlsplit(url).netloc for url in self.requests if not url.startswith("data:")} == {LISTEN}
        assert self.said == []

    def row(self, name: str) -> Locator:
        """Return the row of a tenant on its first device."""
        return self.page.locator("tbody tr").filter(has=self.page.get_by_text(name, exact=True)).first

    def cell(self, name: str, column: str) -> Locator:
        """Return one figure of a tenant."""
        return self.row(name).locator(f'td[data-name="{column}"]')

    def names(self) -> list[str]:
        """Return the tenants in the order of rows."""
        return self.page.locator("tbody th > bdi").all_inner_texts()

    def marked(self) -> bool:
        """Return whether this is still the page that `mark` has marked, not a reloaded one."""
        return bool(self.page.evaluate("window.marked === true"))

    def mark(self) -> None:
        """Mark the page, so that a reload can be detected."""
        self.page.evaluate("window.marked = true")

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in a script of the page."""
        return self.page.evaluate(expression)
